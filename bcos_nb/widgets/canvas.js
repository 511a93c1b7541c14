// A table of pictures with attribution maps. Everything arrives once in `content`; thresholds, styles, scores, hover and brush are
// worked out here, so that no movement of a control waits for Python. Plain ES module, no build step; see nbs/widgets/canvas.ipynb.

const LEVELS = 65000;  // attribution a in (0, 1] is stored as 1 + floor(a * LEVELS), 0 stays 0
const ISO = [0.25, 0.5, 0.75];
const valueOf = (q) => q === 0 ? 0 : Math.min((q - 0.5) / LEVELS, 1);
const lowest = (threshold) => Math.min(Math.max(Math.ceil(threshold * LEVELS - 1e-4), 0), LEVELS) + 1;  // first stored value that is kept
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toPrecision(3)}`;
const make = (tag, name, parent, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
};

function typed(view, Type) {  // a copy, because a buffer of a message need not be aligned
  if (!view) return null;
  const bytes = view instanceof DataView ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : new Uint8Array(view);
  return new Type(bytes.slice().buffer);
}

// ---- what is sent, made ready to paint and to score

function readImage(image) {
  const rgb = typed(image.rgb, Uint8Array), grey = new Float32Array(rgb.length / 3);
  for (let i = 0, k = 0; i < grey.length; i++, k += 3) grey[i] = 0.299 * rgb[k] + 0.587 * rgb[k + 1] + 0.114 * rgb[k + 2];
  return { width: image.width, height: image.height, rgb, grey };
}

function readMask(mask) {
  const bits = typed(mask.bits, Uint8Array), inside = new Uint8Array(mask.width * mask.height);
  for (let i = 0; i < inside.length; i++) inside[i] = (bits[i >> 3] >> (7 - (i & 7))) & 1;
  return { width: mask.width, height: mask.height, inside, edge: borders((i) => inside[i], mask.width, mask.height) };
}

function readPanel(panel, images, masks) {
  return { ...panel, image: images[panel.image], mask: masks[panel.mask] || null, map: typed(panel.attribution, Uint16Array),
           contributions: typed(panel.contributions, Int16Array), rgba: typed(panel.rgba, Uint8Array), relief: null, filled: null, drawn: null };
}

function keptOf(panel, from) {  // number and sum of the values that are kept, and those inside the mask; one pass is faster than any table of them
  const { map, mask } = panel, inside = mask && mask.inside;
  let count = 0, sum = 0, within = 0, part = 0;
  for (let i = 0; i < map.length; i++) {
    const q = map[i];
    if (q < from) continue;
    count++;
    sum += q;
    if (inside && inside[i]) { within++; part += q; }
  }
  return { count, within, sum: (sum - 0.5 * count) / LEVELS, part: (part - 0.5 * within) / LEVELS };
}

function scoresOf(panel, threshold) {  // as localization_scores: nothing left scores 0; null where there is nothing to score
  if (!panel.map) return { weighted: null, unweighted: null, kept: null };
  const found = keptOf(panel, lowest(threshold)), share = (part, whole) => whole > 0 ? part / whole : 0;
  const kept = found.count / panel.map.length;
  if (!panel.mask) return { weighted: null, unweighted: null, kept };
  return { weighted: share(found.part, found.sum), unweighted: share(found.within, found.count), kept };
}

function boxOf(panel, box, threshold) {  // share of what is left inside a rectangle, and of the signed contributions
  const [x0, y0, x1, y1] = box, width = panel.image.width, from = lowest(threshold);
  let part = 0, pieces = 0, total = 0;
  for (let y = y0; y < y1; y++) for (let x = x0, i = y * width + x0; x < x1; x++, i++) {
    if (panel.map && panel.map[i] >= from) part += (panel.map[i] - 0.5) / LEVELS;
    if (panel.contributions) pieces += panel.contributions[i];
  }
  if (panel.contributions) for (let i = 0; i < panel.contributions.length; i++) total += panel.contributions[i];
  const scale = panel.scale / 32767, whole = panel.map ? keptOf(panel, from).sum : 0;
  return { attribution: panel.map ? (whole > 0 ? part / whole : 0) : null,
           contribution: panel.contributions ? pieces * scale : null, contributions: panel.contributions ? total * scale : null };
}

// ---- lines

function borders(inside, width, height) {  // along the edges of pixels
  const path = new Path2D();
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const i = y * width + x;
    if (!inside(i)) continue;
    if (y === 0 || !inside(i - width)) { path.moveTo(x, y); path.lineTo(x + 1, y); }
    if (y === height - 1 || !inside(i + width)) { path.moveTo(x, y + 1); path.lineTo(x + 1, y + 1); }
    if (x === 0 || !inside(i - 1)) { path.moveTo(x, y); path.lineTo(x, y + 1); }
    if (x === width - 1 || !inside(i + 1)) { path.moveTo(x + 1, y); path.lineTo(x + 1, y + 1); }
  }
  return path;
}

const ROUGH = 0.03;  // a map that a 3 × 3 average changes by more than this share of its spread is averaged again before lines are drawn on it

function averaged(field, width, height) {  // over 3 × 3 pixels, weights 1 2 1
  const across = new Float32Array(field.length), out = new Float32Array(field.length);
  for (let y = 0; y < height; y++) for (let x = 0, i = y * width; x < width; x++, i++) {
    across[i] = (field[x ? i - 1 : i] + 2 * field[i] + field[x < width - 1 ? i + 1 : i]) / 4;
  }
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i++) {
    out[i] = (across[y ? i - width : i] + 2 * across[i] + across[y < height - 1 ? i + width : i]) / 4;
  }
  return out;
}

function reliefOf(map, width, height, across, down) {  // a map at the pixels of the screen, and how steep it is there, for `isoline`
  let field = Float32Array.from(map), mean = 0, spread = 0;
  for (let i = 0; i < field.length; i++) mean += field[i] / field.length;
  for (let i = 0; i < field.length; i++) spread += Math.abs(field[i] - mean);
  for (let pass = 0; pass < 8; pass++) {  // speckle has no lines worth drawing
    const smooth = averaged(field, width, height);
    let moved = 0;
    for (let i = 0; i < field.length; i++) moved += Math.abs(field[i] - smooth[i]);
    field = smooth;
    if (moved <= ROUGH * spread) break;
  }
  const level = new Float32Array(across * down), slope = new Float32Array(across * down);
  for (let y = 0, k = 0; y < down; y++) {
    const v = Math.min(Math.max((y + 0.5) * height / down - 0.5, 0), height - 1), top = Math.floor(v), b = v - top, low = Math.min(top + 1, height - 1) * width;
    for (let x = 0; x < across; x++, k++) {
      const u = Math.min(Math.max((x + 0.5) * width / across - 0.5, 0), width - 1), left = Math.floor(u), a = u - left, right = Math.min(left + 1, width - 1);
      const upper = field[top * width + left] * (1 - a) + field[top * width + right] * a, lower = field[low + left] * (1 - a) + field[low + right] * a;
      level[k] = upper * (1 - b) + lower * b;
    }
  }
  for (let y = 0, k = 0; y < down; y++) for (let x = 0; x < across; x++, k++) {
    const dx = level[x < across - 1 ? k + 1 : k] - level[x ? k - 1 : k], dy = level[y < down - 1 ? k + across : k] - level[y ? k - across : k];
    slope[k] = dx || dy ? Math.max(Math.sqrt(dx * dx + dy * dy) / 2, LEVELS * 5e-4) : 1e-6;  // no thick lines where it is nearly flat, none where it is flat
  }
  return { level, slope };
}

function isoline(relief, at, colour, width, rim, out) {  // over what is in `out`, by the distance of each pixel from the line: as fast on a noisy map as on a smooth one
  const { level, slope } = relief, [red, green, blue] = colour, inner = width / 2 + 0.5, outer = inner + rim;
  for (let i = 0, k = 0; i < level.length; i++, k += 4) {
    const off = Math.abs(level[i] - at);
    if (off >= outer * slope[i]) continue;
    const far = off / slope[i], line = Math.min(Math.max(inner - far, 0), 1), dark = 0.55 * Math.min(outer - far, 1);
    const below = (1 - line) * (1 - dark) * out[k + 3] / 255, alpha = line + (1 - line) * dark + below;
    out[k] = (red * line + out[k] * below) / alpha;
    out[k + 1] = (green * line + out[k + 1] * below) / alpha;
    out[k + 2] = (blue * line + out[k + 2] * below) / alpha;
    out[k + 3] = 255 * alpha;
  }
}

// ---- pictures

class Brushwork {  // look-up tables for one set of colours and one opacity
  constructor(palette) {
    this.heat = typed(palette.heat, Uint8Array);
    this.outline = palette.outline;
    this.positive = palette.positive;
    this.negative = palette.negative;
    this.dim = palette.dim;
    this.alpha = new Float32Array(LEVELS + 2);
    this.entry = new Uint16Array(LEVELS + 2);
    for (let q = 0; q < LEVELS + 2; q++) this.entry[q] = 3 * Math.floor(255 * valueOf(q) + 1e-3);
  }

  mix(opacity) {
    if (opacity === this.opacity) return;
    this.opacity = opacity;
    for (let q = 0; q < LEVELS + 2; q++) this.alpha[q] = opacity * Math.sqrt(valueOf(q));
  }

  fill(panel, style, threshold, opacity, out) {  // one pixel of `out` for each of the image
    this.mix(opacity);
    const { rgb, grey } = panel.image, from = lowest(threshold), count = grey.length, { heat, alpha, entry, dim } = this;
    if (style === "colour") {  // on white, as reports.figures.on_white
      const rgba = panel.rgba, map = panel.map;
      for (let i = 0, k = 0; i < count; i++, k += 4) {
        const a = map && map[i] < from ? 0 : rgba[k + 3] / 255;
        for (let c = 0; c < 3; c++) out[k + c] = rgba[k + c] * a + 255 * (1 - a);
        out[k + 3] = 255;
      }
    } else if (style === "signed") {
      const pieces = panel.contributions, strong = Math.max(panel.strong * 32767, 1);
      for (let i = 0, k = 0; i < count; i++, k += 4) {
        const a = opacity * Math.sqrt(Math.min(Math.abs(pieces[i]) / strong, 1)), colour = pieces[i] < 0 ? this.negative : this.positive;
        for (let c = 0; c < 3; c++) out[k + c] = grey[i] * dim * (1 - a) + colour[c] * a;
        out[k + 3] = 255;
      }
    } else if (style === "heat") {  // as reports.figures.heat_overlay
      const map = panel.map;
      for (let i = 0, k = 0; i < count; i++, k += 4) {
        const q = map[i] < from ? 0 : map[i], a = alpha[q], at = entry[q], ground = grey[i] * dim * (1 - a);
        out[k] = ground + heat[at] * a; out[k + 1] = ground + heat[at + 1] * a; out[k + 2] = ground + heat[at + 2] * a;
        out[k + 3] = 255;
      }
    } else {
      for (let i = 0, k = 0, j = 0; i < count; i++, k += 4, j += 3) {
        out[k] = rgb[j]; out[k + 1] = rgb[j + 1]; out[k + 2] = rgb[j + 2]; out[k + 3] = 255;
      }
    }
  }
}

function styleFor(panel, style) {  // what the panel has
  if (!panel.map) return style === "colour" && panel.rgba ? style : "outline only";
  if ((style === "colour" && !panel.rgba) || (style === "signed" && !panel.contributions)) return "heat";
  return style;
}

function stroke(context, path, colour, width, unit, dash = []) {
  context.setLineDash(dash.map((length) => length * unit));
  context.strokeStyle = "rgba(0, 0, 0, 0.55)";
  context.lineWidth = (width + 1.6) * unit;
  context.stroke(path);
  context.strokeStyle = colour;
  context.lineWidth = width * unit;
  context.stroke(path);
  context.setLineDash([]);
}

function drawIsolines(context, panel, shown, threshold, brushwork, unit) {  // on the pixels of the screen
  const { width, height } = context.canvas;
  if (!panel.relief) {
    panel.relief = reliefOf(panel.map, panel.image.width, panel.image.height, width, height);
    panel.ground = new ImageData(width, height);
    panel.sheet = new ImageData(width, height);
    if (shown === "contours") for (const level of ISO) {
      const at = 3 * Math.round(255 * (0.35 + 0.6 * level));
      isoline(panel.relief, level * LEVELS + 1, brushwork.heat.slice(at, at + 3), unit, 0.8 * unit, panel.ground.data);
    }
    panel.relief.shown = shown;
  }
  panel.sheet.data.set(panel.ground.data);
  if (threshold > 0) isoline(panel.relief, lowest(threshold) - 0.5, [255, 255, 255], 1.6 * unit, 0.8 * unit, panel.sheet.data);  // at 0 everything is kept
  context.putImageData(panel.sheet, 0, 0);
}

function drawLines(context, panel, state, brushwork, size) {  // over the picture, in its pixels
  const unit = panel.image.width / size, { style, threshold } = state, shown = styleFor(panel, style);
  context.lineJoin = "round";
  if (shown === "contours" || shown === "signed") {
    if (panel.relief && panel.relief.shown !== shown) panel.relief = null;
    drawIsolines(context, panel, shown, threshold, brushwork, context.canvas.width / size);
  }
  for (const box of panel.boxes || []) {
    const path = new Path2D();
    path.rect(box.x + unit, box.y + unit, box.width - 2 * unit, box.height - 2 * unit);
    stroke(context, path, box.colour || brushwork.outline, box.line || 2, unit, box.dash || []);
  }
  if (state.outline && panel.mask) stroke(context, panel.mask.edge, brushwork.outline, 1.4, unit);
  if (state.brush) {
    const [x0, y0, x1, y1] = state.brush, path = new Path2D();
    path.rect(x0, y0, x1 - x0, y1 - y0);
    stroke(context, path, "#ffffff", 1.4, unit, [4, 3]);
  }
}

// ---- the widget

const density = () => Math.max(window.devicePixelRatio || 1, 1);

function render({ model, el }) {
  const root = make("div", "bcos-canvas", el);
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true";  // or JupyterLab takes the arrow keys
  root.setAttribute("role", "group");
  const table = make("div", "bcos-table", root), gone = new AbortController(), listen = { signal: gone.signal };
  const state = () => ({ threshold: model.get("threshold"), style: model.get("look"), opacity: model.get("opacity"),
                         outline: model.get("outline"),
                         brush: dragged && dragged.box ? dragged.box : model.get("brush") });  // what is being dragged stays here until it is let go
  let brushwork = new Brushwork(model.get("palette")), panels = [], heads = [], leads = [], waiting = 0, dragged = null, stopped = false;

  const later = {};  // what Python hears of, at most every 80 ms
  function tell(name, value) {
    later[name] = later[name] || {};
    later[name].value = value;
    if (later[name].timer) return;
    later[name].timer = setTimeout(() => {
      later[name].timer = 0;
      if (stopped) return;
      model.set(name, later[name].value);
      model.save_changes();
    }, 80);
  }

  let built = "";  // what the table on the page is made for

  function build(content, images, side) {  // the page's elements for a table of this form
    const columns = content.columns || [], rows = content.rows || [], plain = model.get("plain");
    const lead = rows.some((name) => name) ? 1 : 0, width = Math.max(columns.length, 1, ...(content.panels || []).map((one) => one.column + 1));
    table.replaceChildren();
    root.classList.toggle("bcos-plain", plain);
    table.style.gridTemplateColumns = `${lead ? "minmax(40px, max-content) " : ""}repeat(${width}, minmax(0, ${side}px))`;
    const place = (element, row, column) => { element.style.gridRow = row + 1; element.style.gridColumn = column + 1; return element; };
    heads = columns.map((name, c) => place(make("div", "bcos-column", table), 0, c + lead));
    leads = rows.map((name, r) => lead ? place(make("div", "bcos-row", table), r + 1, 0) : null);
    panels = (content.panels || []).map((one, index) => {
      const figure = place(make("figure", "bcos-panel", table), one.row + 1, one.column + lead), panel = { figure, index };
      if (one.title) panel.titleText = make("figcaption", "bcos-title", figure);
      if (one.words) {
        panel.wordsText = make("div", "bcos-words", figure);
        return panel;
      }
      const { width: w, height: h } = images[one.image];
      const stage = make("div", "bcos-stage", figure), canvas = make("canvas", "bcos-picture", stage), lines = make("canvas", "bcos-lines", stage);
      canvas.width = w;  // the picture pixel by pixel, which the page enlarges; lines above it as fine as the screen
      canvas.height = h;
      canvas.classList.toggle("bcos-enlarged", w <= side);  // an enlarged pixel stays one pixel: it was scored as one
      lines.width = Math.round(side * density());
      lines.height = Math.round(lines.width * h / w);
      canvas.setAttribute("role", "img");
      lines.setAttribute("aria-hidden", "true");
      Object.assign(panel, { stage, canvas, lines, data: new ImageData(w, h), label: make("div", "bcos-label", stage), score: make("div", "bcos-score", figure),
                             inBox: make("div", "bcos-box", figure) });
      if (one.note) panel.noteText = make("div", "bcos-note", figure);
      if (one.attribution && one.mask >= 0) {
        for (const name of ["weighted", "unweighted"]) panel[`${name}Text`] = make("b", "", make("span", `bcos-${name}`, panel.score, `${name} `));
      }
      panel.measureTexts = Object.keys(one.measures || {}).map((name) => [name, make("b", "", make("span", `bcos-${name}`, panel.score, `${name} `))]);
      if (one.attribution && !plain) panel.keptText = make("span", "bcos-kept", panel.score);
      watch(panel);
      return panel;
    });
  }

  function read() {
    const content = model.get("content") || {}, side = model.get("side");
    const images = (content.images || []).map(readImage), masks = (content.masks || []).map(readMask);
    const form = JSON.stringify([side, density(), model.get("plain"), (content.columns || []).length, (content.rows || []).map((name) => !!name),
      (content.panels || []).map((one) => [one.row, one.column, !!one.title, !!one.words, !!one.note, Object.keys(one.measures || {}),
        one.words ? 0 : [images[one.image].width, images[one.image].height, !!one.attribution, one.mask >= 0]])]);
    if (form !== built) build(content, images, side);  // else the elements that are there get other pictures and words
    built = form;
    root.setAttribute("aria-label", model.get("description"));
    const write = (element, text) => { if (element && element.textContent !== text) element.textContent = text; };
    heads.forEach((element, c) => write(element, content.columns[c]));
    leads.forEach((element, r) => write(element, content.rows[r]));
    (content.panels || []).forEach((one, k) => {
      const panel = panels[k];
      write(panel.titleText, one.title); write(panel.wordsText, one.words); write(panel.noteText, one.note);
      if (!panel.canvas) return;
      Object.assign(panel, readPanel(one, images, masks));
      panel.label.style.display = "none";
    });
    paint();
  }

  function paint() {
    waiting = 0;
    if (stopped) return;
    const now = state(), told = [];
    for (const panel of panels) {
      if (!panel.canvas) { told.push({}); continue; }
      picture(panel, now);
      const scores = scoresOf(panel, now.threshold), box = now.brush && fits(panel, now.brush) ? boxOf(panel, now.brush, now.threshold) : null;
      if (panel.weightedText) {
        panel.weightedText.textContent = scores.weighted.toFixed(3);
        panel.unweightedText.textContent = scores.unweighted.toFixed(3);
      }
      const at = Math.round(now.threshold * 100);  // measures come with 101 values each
      for (const [name, text] of panel.measureTexts) text.textContent = panel.measures[name][at].toFixed(3);
      if (panel.keptText) panel.keptText.textContent = `${percent(scores.kept)} kept`;
      panel.inBox.textContent = !box ? "" : (box.attribution === null ? "" : `box: ${percent(box.attribution)} of the attribution`)
        + (box.contribution === null ? "" : `, ${signed(box.contribution)} of ${signed(box.contributions)}`);
      panel.canvas.setAttribute("aria-label", [panel.label_text || panel.title || "picture", panel.note,
        scores.kept === null ? "" : `threshold ${now.threshold.toFixed(2)}, ${percent(scores.kept)} of the pixels kept`,
        scores.weighted === null ? "" : `weighted score ${scores.weighted.toFixed(3)}, unweighted ${scores.unweighted.toFixed(3)}`].filter(Boolean).join("; "));
      panel.figure.classList.toggle("bcos-selected", model.get("selected") === panel.index);
      told.push({ ...scores, box: box && box.attribution });
    }
    tell("scores", told);
    mark(now.threshold);
  }

  let plots = [];  // where the lines of the threshold are: line, left and width of its plot

  function measure() {  // finds the plots of the named figure, whose x axis is [0, 1], and puts a line over each
    const name = model.get("marks");
    plots = [];
    for (const figure of name ? document.querySelectorAll(`.${name} .svg-container`) : []) {
      const ground = figure.getBoundingClientRect(), places = figure.querySelectorAll(".nsewdrag");
      let lines = figure.querySelectorAll(":scope > .bcos-mark");
      if (lines.length !== places.length) {
        lines.forEach((line) => line.remove());
        lines = [...places].map(() => make("div", "bcos-mark", figure));
      }
      places.forEach((place, k) => {
        const box = place.getBoundingClientRect();
        Object.assign(lines[k].style, { top: `${box.top - ground.top}px`, height: `${box.height}px`, width: "1px",
          background: "var(--jp-ui-font-color1, #5f6368)" });  // written here, because plotly's own style takes borders away
        plots.push({ line: lines[k], left: box.left - ground.left, width: box.width });
      });
    }
    mark(model.get("threshold"));
  }

  function mark(threshold) {
    for (const { line, left, width } of plots) {
      line.style.left = `${Math.round(left + threshold * width)}px`;
      line.dataset.threshold = threshold.toFixed(2);
    }
  }
  const repaint = () => { if (!waiting) waiting = requestAnimationFrame(paint); };

  function picture(panel, now) {
    const shown = styleFor(panel, now.style), key = `${shown} ${now.opacity} ${shown === "heat" || shown === "colour" ? lowest(now.threshold) : ""}`;
    if (panel.filled !== key) {
      brushwork.fill(panel, shown, now.threshold, now.opacity, panel.data.data);
      panel.canvas.getContext("2d", { willReadFrequently: true }).putImageData(panel.data, 0, 0);
      panel.filled = key;
    }
    const drawn = `${shown} ${now.outline} ${now.brush} ${shown === "contours" || shown === "signed" ? lowest(now.threshold) : ""}`;
    if (panel.drawn === drawn) return;
    panel.drawn = drawn;
    const context = panel.lines.getContext("2d"), { width, height } = panel.lines;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(width / panel.image.width, 0, 0, height / panel.image.height, 0, 0);
    drawLines(context, panel, now, brushwork, width / density());
  }

  const fits = (panel, box) => box[0] >= 0 && box[1] >= 0 && box[2] <= panel.image.width && box[3] <= panel.image.height;

  function watch(panel) {
    const at = (event, whole) => {
      const box = panel.canvas.getBoundingClientRect(), { width, height } = panel.image;
      const x = (event.clientX - box.left) / box.width * width, y = (event.clientY - box.top) / box.height * height;
      return whole ? [Math.min(Math.max(Math.floor(x), 0), width - 1), Math.min(Math.max(Math.floor(y), 0), height - 1)]
        : [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)];
    };
    const stretch = (event) => {
      if (!dragged || dragged.panel !== panel) return;
      const [a, b] = at(event), [c, d] = dragged.start;
      if (Math.abs(a - c) < 1 && Math.abs(b - d) < 1) return;
      dragged.box = [Math.floor(Math.min(a, c)), Math.floor(Math.min(b, d)), Math.ceil(Math.max(a, c)), Math.ceil(Math.max(b, d))];
      repaint();
    };
    if (model.get("plain")) {
      panel.stage.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        event.preventDefault();
        root.focus({ preventScroll: true });
        model.set("selected", panel.index);
        model.save_changes();
      }, listen);
      return;
    }
    panel.stage.addEventListener("pointermove", (event) => {
      const [x, y] = at(event, true);
      hover(x, y, panel);
      stretch(event);
    }, listen);
    panel.stage.addEventListener("pointerleave", () => { if (!dragged) hover(null); }, listen);
    panel.stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();  // no text is selected; the focus is taken by hand
      root.focus({ preventScroll: true });
      panel.stage.setPointerCapture(event.pointerId);
      dragged = { panel, start: at(event), box: null };
      model.set("selected", panel.index);
    }, listen);
    const end = (event) => {
      if (!dragged) return;
      stretch(event);  // a busy page hears of the last movement only now
      const { box } = dragged;
      dragged = null;
      model.set("brush", box);
      model.save_changes();
    };
    panel.stage.addEventListener("pointerup", end, listen);
    panel.stage.addEventListener("pointercancel", end, listen);
  }

  function hover(x, y, over) {
    const told = x === null ? {} : { x, y, panel: over.index, attribution: [], contribution: [] };
    for (const panel of panels) {
      const there = panel.canvas && x !== null && panel.image.width === over.image.width && panel.image.height === over.image.height;
      const i = there ? y * panel.image.width + x : 0;
      const attribution = there && panel.map ? valueOf(panel.map[i]) : null;
      const contribution = there && panel.contributions ? panel.contributions[i] * panel.scale / 32767 : null;
      if (panel.label) {
        panel.label.style.display = there ? "block" : "none";
        panel.label.textContent = !there ? "" : `${x}, ${y}` + (attribution === null ? "" : ` · attribution ${attribution.toFixed(3)}`)
          + (contribution === null ? "" : ` · contribution ${signed(contribution)}`);
        panel.label.classList.toggle("bcos-low", there && y < panel.image.height * 0.8);
      }
      if (x !== null) { told.attribution.push(attribution); told.contribution.push(contribution); }
    }
    tell("hover", told);
  }

  root.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key], upwards = { ArrowDown: -1, ArrowUp: 1 }[event.key];
    const set = (threshold) => { model.set("threshold", Math.round(Math.min(Math.max(threshold, 0), 1) * 1000) / 1000); model.save_changes(); };
    if (sideways && model.get("arrows") === "frames") model.send({ event: "step", by: sideways });
    else if (model.get("plain")) return;
    else if (sideways || upwards) set(model.get("threshold") + (sideways || upwards) * (event.shiftKey ? 0.1 : 0.01));
    else if (event.key === "Home" || event.key === "End") set(event.key === "End" ? 1 : 0);
    else if (event.key === "Escape") { model.set("brush", null); model.save_changes(); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, listen);

  function texts(sheet, root, x, y) {  // the words of an element, line by line
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const parent = node.parentElement, style = getComputedStyle(parent);
      if (!node.data.trim() || !parent.getClientRects().length || style.visibility === "hidden" || parent.closest("svg, style, .bcos-label, .modebar-container")) continue;
      const first = getComputedStyle(parent, "::first-line").fontWeight;
      sheet.fillStyle = style.color;
      sheet.globalAlpha = Number(style.opacity);
      sheet.textBaseline = "middle";
      const range = document.createRange();
      let from = 0;  // a text may run over several lines
      for (let to = 1; to <= node.length; to++) {
        range.setStart(node, to - 1); range.setEnd(node, to);
        const here = range.getBoundingClientRect();
        range.setStart(node, to < node.length ? to : to - 1); range.setEnd(node, Math.min(to + 1, node.length));
        const next = range.getBoundingClientRect();
        if (to < node.length && next.top < here.bottom - 2) continue;
        range.setStart(node, from); range.setEnd(node, to);
        const line = range.getBoundingClientRect();
        sheet.font = `${from === 0 ? first : style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
        sheet.fillText(node.data.slice(from, to), line.left + x, (line.top + line.bottom) / 2 + y);
        from = to;
      }
      sheet.globalAlpha = 1;
    }
  }

  async function drawing(svg) {  // plotly's curves
    const copy = svg.cloneNode(true), box = svg.getBoundingClientRect();
    copy.setAttribute("width", box.width);
    copy.setAttribute("height", box.height);
    const image = Object.assign(new Image(), { src: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}` });
    await image.decode();
    return image;
  }

  async function shapes(sheet, root, x, y) {  // grounds, lines, pictures and drawings of an element and all in it
    for (const element of [root, ...root.querySelectorAll("*")]) {
      if (!element.getClientRects().length || element.closest(".modebar-container, .bcos-label") || element.closest("svg") && element.tagName !== "svg" || element.parentElement.closest("svg")) continue;
      const box = element.getBoundingClientRect(), style = getComputedStyle(element), at = [box.left + x, box.top + y, box.width, box.height];
      if (style.visibility === "hidden") continue;
      if (element.tagName === "svg") sheet.drawImage(await drawing(element), ...at);
      else if (element.tagName === "CANVAS") {
        sheet.imageSmoothingEnabled = box.width < element.width;
        sheet.drawImage(element, ...at);
      } else {
        if (!/, 0\)|transparent/.test(style.backgroundColor)) { sheet.fillStyle = style.backgroundColor; sheet.fillRect(...at); }
        const [left, upper, right, lower] = [at[0], at[1], at[0] + at[2], at[1] + at[3]];
        for (const [side, ...line] of [["Top", left, upper, right, upper], ["Bottom", left, lower, right, lower], ["Left", left, upper, left, lower], ["Right", right, upper, right, lower]]) {
          if (style[`border${side}Style`] === "none") continue;
          sheet.lineWidth = parseFloat(style[`border${side}Width`]);
          sheet.strokeStyle = style[`border${side}Color`];
          sheet.setLineDash(style[`border${side}Style`] === "solid" ? [] : [2, 2]);
          sheet.beginPath(); sheet.moveTo(line[0], line[1]); sheet.lineTo(line[2], line[3]); sheet.stroke();
          sheet.setLineDash([]);
        }
        if (style.outlineStyle === "solid") {
          sheet.lineWidth = parseFloat(style.outlineWidth);
          sheet.strokeStyle = style.outlineColor;
          sheet.strokeRect(at[0] + 1, at[1] + 1, at[2] - 2, at[3] - 2);
        }
      }
    }
    texts(sheet, root, x, y);
  }

  async function whole() {  // everything that is shown, and what belongs to it, as one picture with its words
    const others = model.get("belongs") ? [...document.querySelectorAll(`.${model.get("belongs")}`)].filter((one) => one.getClientRects().length && one.textContent.trim()) : [];
    const parts = [table, ...others].map((root) => ({ root, box: root.getBoundingClientRect() })).sort((a, b) => a.box.top - b.box.top), density = 2, pad = 12;
    const left = Math.min(...parts.map(({ box }) => box.left));
    const across = ({ root, box }) => Math.max(...[...root.querySelectorAll("*")].map((one) => one.getBoundingClientRect().right).filter((right) => right <= box.right)) - left;
    const sheet = document.createElement("canvas"), context = sheet.getContext("2d");
    sheet.width = Math.ceil(Math.max(...parts.map(across)) + 2 * pad) * density;
    sheet.height = Math.ceil(parts.reduce((sum, { box }) => sum + box.height + pad, pad)) * density;
    context.scale(density, density);
    context.fillStyle = getComputedStyle(root).getPropertyValue("--bcos-ground").trim() || "#ffffff";
    context.fillRect(0, 0, sheet.width, sheet.height);
    let top = pad;
    for (const { root: part, box } of parts) {
      await shapes(context, part, pad - left, top - box.top);
      top += box.height + pad;
    }
    return sheet;
  }

  const hear = (message) => {
    if (message.do === "focus") root.focus();
    if (message.do !== "picture") return;
    paint();
    whole().then((sheet) => sheet.toBlob(async (blob) => model.send({ event: "picture", number: message.number }, undefined, [await blob.arrayBuffer()]), "image/png"))
      .catch((error) => model.send({ event: "no picture", number: message.number, why: String(error) }));
  };
  const play = () => {  // from the threshold to 1, then from 0 again
    clearInterval(state.player);
    if (!model.get("playing")) return;
    state.player = setInterval(() => {
      const next = Math.round(100 * model.get("threshold")) + 1;
      model.set("threshold", next > 100 ? 0 : next / 100);
      model.save_changes();
    }, 60);
  };
  const colours = () => { brushwork = new Brushwork(model.get("palette")); panels.forEach((panel) => { panel.filled = panel.drawn = panel.relief = null; }); repaint(); };
  const watched = { "change:content": read, "change:side": read, "change:palette": colours, "change:playing": play, "msg:custom": hear };
  for (const name of ["threshold", "opacity", "look", "outline", "brush", "selected"]) watched[`change:${name}`] = repaint;
  for (const [name, action] of Object.entries(watched)) model.on(name, action);
  read();
  function name() {  // for a screen reader, which finds no name at ipywidgets' sliders, at fields without a label and at buttons that are icons
    const all = root.closest(".bcos-explorer, .bcos-grids");
    if (!all) return;
    for (const handle of all.querySelectorAll("[role=slider]:not([aria-label])")) {
      const slider = handle.closest(".widget-slider, .widget-hslider"), label = slider && slider.querySelector(".widget-label");
      if (!label) continue;
      const handles = [...slider.querySelectorAll("[role=slider]")];
      handle.setAttribute("aria-label", label.textContent + (handles.length > 1 ? [", from", ", to"][handles.indexOf(handle)] : ""));
    }
    for (const upload of all.querySelectorAll(".bcos-save .widget-upload:not([aria-label])")) upload.setAttribute("aria-label", "restore");
    for (const field of all.querySelectorAll("input[placeholder]:not([aria-label])")) field.setAttribute("aria-label", field.placeholder);
    for (const icon of all.querySelectorAll("button > i:not([aria-hidden])")) icon.setAttribute("aria-hidden", "true");  // an icon is a letter of a font
    for (const button of all.querySelectorAll("button[title]:not([aria-label])")) {
      if (button.title && !/[a-z]/i.test(button.textContent)) button.setAttribute("aria-label", button.title);
    }
    for (const button of all.querySelectorAll(".widget-toggle-button")) {
      const pressed = String(button.classList.contains("mod-active"));
      if (button.getAttribute("aria-pressed") !== pressed) button.setAttribute("aria-pressed", pressed);
    }
    for (const bar of all.querySelectorAll(".progress:not([role])")) {
      bar.setAttribute("role", "progressbar");
      bar.setAttribute("aria-label", "how far the network is");
    }
    for (const drawing of all.querySelectorAll(".js-plotly-plot svg:not([aria-hidden])")) drawing.setAttribute("aria-hidden", "true");  // lines and numbers without order
    for (const figure of all.querySelectorAll(".js-plotly-plot:not([role])")) {
      figure.setAttribute("role", "group");
      figure.setAttribute("aria-label", "curves over the threshold; “CSV” saves their values as a table");
    }
  }
  const marking = setInterval(() => { measure(); name(); }, 500);  // a figure is drawn later than the canvas, drawn anew, or resized
  return () => {
    stopped = true;
    clearInterval(state.player);
    clearInterval(marking);
    gone.abort();
    for (const [name, action] of Object.entries(watched)) model.off(name, action);
  };
}

export default { render };
