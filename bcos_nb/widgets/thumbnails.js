// Small pictures to choose one from, by mouse or by keyboard.

function render({ model, el }) {
  const root = document.createElement("div"), gone = new AbortController(), listen = { signal: gone.signal };
  root.className = "bcos-thumbs";
  root.setAttribute("role", "listbox");
  root.dataset.lmSuppressShortcuts = "true";  // or JupyterLab takes the arrow keys
  el.append(root);
  let buttons = [], addresses = [];

  function forget() { addresses.forEach((address) => URL.revokeObjectURL(address)); addresses = []; }

  function read() {
    forget();
    const pictures = model.get("pictures"), labels = model.get("labels"), columns = model.get("columns"), side = model.get("side");
    root.setAttribute("aria-label", model.get("description"));
    root.style.gridTemplateColumns = columns ? `repeat(${columns}, ${side}px)` : `repeat(auto-fill, ${side}px)`;
    root.classList.toggle("bcos-close", columns > 0);
    buttons = pictures.map((picture, index) => {
      const button = document.createElement("button"), image = document.createElement("img");
      addresses.push(URL.createObjectURL(new Blob([picture], { type: "image/jpeg" })));
      image.src = addresses.at(-1);
      image.alt = ""; image.width = image.height = side; image.draggable = false;
      button.type = "button"; button.title = labels[index] || "";
      button.setAttribute("role", "option");
      button.setAttribute("aria-label", `${index + 1}: ${labels[index] || ""}`);
      button.append(image);
      button.addEventListener("click", () => choose(index), listen);
      return button;
    });
    root.replaceChildren(...buttons);
    mark();
  }

  function mark() {
    const selected = model.get("selected"), marked = new Set(model.get("marked"));
    buttons.forEach((button, index) => {
      button.classList.toggle("bcos-chosen", index === selected);
      button.classList.toggle("bcos-marked", marked.has(index));
      button.setAttribute("aria-selected", index === selected);
      button.tabIndex = index === Math.max(selected, 0) ? 0 : -1;
    });
  }

  function choose(index) {
    model.set("selected", index);
    model.send({ event: "chosen", index });  // the same one may be chosen again
    model.save_changes();
    mark();
  }

  root.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const across = Math.max(1, Math.round(root.clientWidth / (buttons[0] ? buttons[0].offsetWidth : 1)));
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -(model.get("columns") || across), ArrowDown: model.get("columns") || across }[event.key];
    if (at < 0 || by === undefined || !buttons[at + by]) return;
    event.preventDefault(); event.stopPropagation();
    buttons[at + by].focus();
  }, listen);

  const watched = { "change:pictures": read, "change:columns": read, "change:selected": mark, "change:marked": mark };
  for (const [name, action] of Object.entries(watched)) model.on(name, action);
  read();
  return () => { gone.abort(); forget(); for (const [name, action] of Object.entries(watched)) model.off(name, action); };
}

export default { render };
