// Shares of the cells as bars, one chart for each map; what is shown follows the threshold without Python.

function floats(view) {  // a copy, because a buffer of a message need not be aligned
  const bytes = view instanceof DataView ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : new Uint8Array(view);
  return new Float32Array(bytes.slice().buffer);
}

const make = (tag, name, parent, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
};

function render({ model, el }) {
  const root = make("div", "bcos-bars", el);
  let charts = [];

  function read() {
    const content = model.get("content"), side = model.get("side"), n = content.n || 0;
    root.replaceChildren();
    root.style.gridTemplateColumns = `repeat(${content.columns || (content.charts || []).length + 1}, minmax(0, ${side}px))`;
    if (n) {
      const key = make("div", "bcos-key", root);
      make("div", "", key, "share of each cell,");
      make("div", "bcos-top", key, "");
      for (const [name, words] of [["fake", "the fake"], ["real", "real faces"], ["chance", `chance, 1/${n * n}`]]) {
        const line = make("div", "", key);
        make("i", `bcos-key-${name}`, line);
        line.append(words);
      }
    }
    charts = (content.charts || []).map((chart) => {
      const figure = make("div", "bcos-chart", root), plot = make("div", "bcos-plot", figure);
      figure.setAttribute("role", "img");
      const chance = make("div", "bcos-chance", plot);
      const bars = Array.from({ length: n * n }, (_, cell) => {
        const bar = make("div", content.fakes.includes(cell) ? "bcos-bar bcos-bar-fake" : "bcos-bar", plot);
        bar.title = `row ${Math.floor(cell / n) + 1}, column ${cell % n + 1}`;
        return bar;
      });
      return { figure, bars, chance, words: make("div", "bcos-winner", figure), name: chart.name, weighted: floats(chart.weighted), unweighted: floats(chart.unweighted) };
    });
    paint();
  }

  function paint() {
    const content = model.get("content"), n = content.n || 0, cells = n * n, at = Math.round(model.get("threshold") * 100), weighting = model.get("weighting");
    const cut = charts.map((chart) => chart[weighting].slice(at * cells, (at + 1) * cells));
    const most = Math.max(0, ...cut.map((shares) => Math.max(...shares))), top = [0.25, 0.5, 1].find((height) => most <= height) || 1;
    const told = root.querySelector(".bcos-top");
    if (told) told.textContent = `a full bar is ${100 * top} %`;
    charts.forEach((chart) => {
      chart.chance.style.bottom = `${100 / cells / top}%`;
      const shares = [...chart[weighting].slice(at * cells, (at + 1) * cells)], best = shares.reduce((a, b, k) => b > shares[a] ? k : a, 0);
      shares.forEach((share, cell) => {
        chart.bars[cell].style.height = `${100 * share / top}%`;
        chart.bars[cell].classList.toggle("bcos-bar-best", shares[best] > 0 && cell === best);
      });
      const found = content.fakes.includes(best), place = `row ${Math.floor(best / n) + 1}, column ${best % n + 1}`;
      const fake = content.fakes.reduce((sum, cell) => sum + shares[cell], 0);
      chart.words.replaceChildren();
      if (!(shares[best] > 0)) {
        make("b", "bcos-none", chart.words, "nothing left");
      } else if (!content.fakes.length) {
        make("b", "", chart.words, `winner: ${place}`);
      } else {
        make("b", found ? "bcos-found" : "bcos-missed", chart.words, found ? "✓ the fake" : "✗ a real face");
        make("div", "", chart.words, place);
        make("div", "bcos-fake-share", chart.words, `fake's share ${fake.toFixed(4)}`);
      }
      chart.figure.setAttribute("aria-label", `${chart.name}: ${[...chart.words.children].map((line) => line.textContent).join(", ")}`);
    });
  }

  const watched = { "change:content": read, "change:side": read, "change:threshold": paint, "change:weighting": paint };
  for (const [name, action] of Object.entries(watched)) model.on(name, action);
  read();
  return () => { for (const [name, action] of Object.entries(watched)) model.off(name, action); };
}

export default { render };
