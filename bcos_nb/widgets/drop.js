// A place to drop, paste or choose image files. They go to Python in pieces, because a message of more than 10 MB ends the connection.
const PIECE = 2 << 20;  // bytes

function render({ model, el }) {
  const root = document.createElement("div"), input = document.createElement("input"), button = document.createElement("button");
  const words = document.createElement("span"), state = document.createElement("div");
  root.className = "bcos-drop";
  root.tabIndex = -1;
  input.type = "file"; input.multiple = true; input.accept = "image/*"; input.hidden = true;
  input.setAttribute("aria-label", "image files");
  button.type = "button"; button.textContent = "Choose images …";
  words.textContent = " or drop or paste them here: photographs or frames, up to " + Math.round(model.get("limit") / 1e6) + " MB each";
  state.className = "bcos-drop-state";
  state.setAttribute("role", "status");
  root.append(button, words, input, state);
  el.append(root);
  const gone = new AbortController(), listen = { signal: gone.signal }, waiting = new Map();
  let queue = Promise.resolve();

  const answer = (number) => new Promise((resolve) => waiting.set(number, resolve));
  async function send(file) {
    const number = Math.floor(Math.random() * 2 ** 40), name = file.name || "pasted image";
    if (file.size > model.get("limit")) {  // refused by Python, which has the words for it; nothing is sent
      model.send({ event: "too large", name, size: file.size });
      return;
    }
    for (let at = 0; at < file.size || at === 0; at += PIECE) {
      const piece = await file.slice(at, at + PIECE).arrayBuffer(), heard = answer(number);
      state.textContent = at + PIECE < file.size ? `${name}: ${Math.round(100 * at / file.size)} %` : `${name}: looking for a face …`;
      model.send({ event: "piece", number, name, size: file.size, at }, undefined, [piece]);
      if (!(await heard)) break;
    }
    state.textContent = "";
  }
  function take(files) {
    for (const file of files) queue = queue.then(() => send(file)).catch((error) => { state.textContent = `${file.name}: ${error}`; });
  }
  const hear = (message) => {
    if (message.do !== "go on") return;
    const resolve = waiting.get(message.number);
    waiting.delete(message.number);
    if (resolve) resolve(message.more);
  };

  button.addEventListener("click", () => input.click(), listen);
  input.addEventListener("change", () => { take([...input.files]); input.value = ""; }, listen);
  for (const name of ["dragover", "dragenter"]) {
    root.addEventListener(name, (event) => { event.preventDefault(); event.stopPropagation(); root.classList.add("bcos-over"); }, listen);
  }
  root.addEventListener("dragleave", () => root.classList.remove("bcos-over"), listen);
  root.addEventListener("drop", (event) => {
    event.preventDefault(); event.stopPropagation();
    root.classList.remove("bcos-over");
    take([...event.dataTransfer.files]);
  }, listen);
  root.addEventListener("paste", (event) => {
    if (!event.clipboardData || !event.clipboardData.files.length) return;
    event.preventDefault(); event.stopPropagation();
    take([...event.clipboardData.files]);
  }, listen);
  model.on("msg:custom", hear);
  return () => { gone.abort(); model.off("msg:custom", hear); };
}

export default { render };
