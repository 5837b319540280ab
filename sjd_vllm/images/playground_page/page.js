// The page: one run at a time, of some pictures or of one picture both ways.

const player = new Player();
let options = null;
let needsKey = false;
let running = null; // the run's AbortController
let lastSeed = null; // of a run whose seed was left to chance
let reading = Promise.resolve(); // of the picture to start from

async function loadOptions() {
  try {
    options = await fetchOptions(byId("key").value);
  } catch (error) {
    if (error.status === 401) {
      needsKey = true;
      byId("key-field").hidden = false;
    }
    const asksFirst = error.status === 401 && !byId("key").value;
    showError(asksFirst ? new ServerError(401, "This server asks for an API key. Type it into the form.") : error);
    return;
  }
  hideError();
  fillForm(options);
  if (location.hash.length > 1) restoreSettings(location.hash);
  else byId("window").value ||= options.defaults.num_speculative_tokens;
  byId("prompt").value ||= options.examples[0] ?? "";
  say(`Ready: the model ${options.model}.`);
  refresh();
}

/** Show what follows from the form. */
function refresh() {
  if (!options) return;
  showStrategyHint(options);
  showStartHint(sizeOf({ size: byId("size").value }));
  byId("make").textContent = Number(byId("n").value) > 1 ? "Make the pictures" : "Make the picture";
  byId("link").value = settingsLink();
  try {
    const settings = readSettings();
    if (lastSeed !== null) settings.seed ??= lastSeed;
    byId("curl").value = curlLine(settings, GENERATIONS, needsKey);
  } catch (error) {
    byId("curl").value = `# ${error.message}`;
  }
}

/** Run some work of pictures with the form's settings; errors are told in words. */
async function run(work) {
  if (!options) {
    await loadOptions();
    if (!options) return;
  }
  if (running) return;
  hideError();
  const controller = new AbortController();
  running = controller;
  document.body.classList.add("running");
  byId("stop").hidden = false;
  byId("compare").hidden = byId("make").disabled = true;
  byId("verdict").hidden = true;
  player.load([]);
  try {
    await reading;
    const settings = readSettings();
    lastSeed = settings.seed === undefined ? BigInt(Math.floor(Math.random() * 2 ** 31)) : null;
    settings.seed ??= lastSeed;
    history.replaceState(null, "", settingsLink());
    await work(settings, controller.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else showError(error);
  } finally {
    controller.abort(); // what still runs beside a failed picture
    running = null;
    document.body.classList.remove("running");
    const hadFocus = document.activeElement === byId("stop");
    byId("stop").hidden = true;
    byId("compare").hidden = byId("make").disabled = false;
    if (hadFocus) byId("make").focus();
    refresh();
  }
}

async function makePictures({ n = 1, ...settings }, signal) {
  if (!Number.isInteger(n) || n < 1 || n > options.max_n) {
    throw new SettingError("n", `Pictures must be a whole number from 1 to ${options.max_n}.`);
  }
  say(`Making ${counted(n, "picture")} …`);
  const cards = Array.from({ length: n }, () => new Card("", sizeOf(settings), settings.prompt));
  showCards(cards);
  await Promise.all(cards.map((card, index) => paint(card, { ...settings, seed: settings.seed + BigInt(index) }, signal)));
  player.load(cards);
  const steps = cards.reduce((sum, card) => sum + card.figures.num_steps, 0);
  const tokens = cards.reduce((sum, card) => sum + card.figures.num_tokens, 0);
  say(`Done: ${counted(n, "picture")}, ${counted(tokens, "token")} in ${counted(steps, "forward")}.`);
}

/** The same seed both ways, one after the other so that neither slows the other, with a window that load does not cut. */
async function compare({ n: _, ...settings }, signal) {
  const sjd = { num_speculative_tokens: options.defaults.num_speculative_tokens, ...settings.sjd };
  delete sjd.method;
  const size = sizeOf(settings);
  const plain = new Card("Plain decoding", size, settings.prompt);
  const jacobi = new Card(`Jacobi decoding, window ${sjd.num_speculative_tokens}`, size, settings.prompt);
  showCards([plain, jacobi]);
  say("Jacobi decoding …");
  await paint(jacobi, { ...settings, sjd }, signal);
  say("Plain decoding …");
  await paint(plain, { ...settings, sjd: { method: "none" } }, signal);
  player.load([plain, jacobi]);
  const forwards = times(plain.figures.num_steps / jacobi.figures.num_steps);
  const speed = plain.figures.decode_seconds / jacobi.figures.decode_seconds;
  const same = plain.b64 === jacobi.b64 ? " Both pictures are the same, bit for bit." : "";
  byId("verdict").replaceChildren(
    element("b", { textContent: forwards }), " fewer forwards, ",
    element("b", { textContent: times(Math.max(speed, 1 / speed)) }), ` ${speed < 1 ? "slower" : "faster"}.${same}`,
  );
  byId("verdict").hidden = false;
  say(`Done: ${byId("verdict").textContent}`);
}

async function paint(card, settings, signal) {
  try {
    for await (const event of streamPicture(settings, byId("key").value, signal)) {
      // the seed that was asked for: read from the answer it would lose digits
      if (event.type === "image_generation.completed") await card.finish(event, settings.seed, useSeed);
      else await card.grow(event);
    }
  } catch (error) {
    card.stop(error.name === "AbortError" ? "stopped" : "failed");
    throw error;
  }
}

function sizeOf(settings) {
  return options.sizes.find(({ size }) => size === settings.size) ?? options.sizes[0];
}

function showCards(cards) {
  byId("cards").dataset.count = cards.length;
  byId("cards").replaceChildren(...cards.map((card) => card.root));
  showResults();
}

/** Where the pictures are below the form, bring them into view. */
function showResults() {
  if (matchMedia("(max-width: 52rem)").matches) byId("results").scrollIntoView();
}

function useSeed(seed) {
  byId("seed").value = seed;
  refresh();
  say(`Seed ${seed} is in the form.`);
}

function say(words) {
  byId("status").textContent = words;
}

function showError(error) {
  if (!(error instanceof ServerError || error instanceof SettingError)) console.error(error);
  const field = fieldOf(error.param);
  const box = byId("error");
  box.querySelector("strong").textContent = field ? `${field.label} cannot be used` : "That did not work";
  box.querySelector("p").textContent = error.message;
  say("");
  if (error.status === 401) {
    needsKey = true;
    byId("key-field").hidden = false;
  }
  const control = error.status === 401 ? byId("key") : field && byId(field.id);
  // Beside the field that it is about, or else above the pictures.
  if (control) (control.closest(".grid") ?? control.closest(".field")).after(box);
  else byId("results").prepend(box);
  box.hidden = false;
  if (!control) {
    showResults();
    return;
  }
  control.closest("details")?.setAttribute("open", "");
  control.setAttribute("aria-invalid", "true");
  control.focus();
}

function hideError() {
  byId("error").hidden = true;
  for (const control of document.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
}

async function copy(source, button) {
  source.select();
  // The clipboard is for secure origins only; elsewhere the selected text is copied the old way.
  const copied = navigator.clipboard
    ? await navigator.clipboard.writeText(source.value).then(() => true, () => document.execCommand("copy"))
    : document.execCommand("copy");
  button.textContent = copied ? "Copied" : "Press Ctrl C";
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(makePictures);
});
byId("form").addEventListener("input", () => {
  if (byId("seed").value) lastSeed = null;
  refresh();
});
byId("init-image").addEventListener("change", () => {
  reading = readGivenPicture(sizeOf({ size: byId("size").value })).then(refresh);
  reading.catch(showError);
});
byId("compare").addEventListener("click", () => run(compare));
byId("stop").addEventListener("click", () => running?.abort());
byId("use-key").addEventListener("click", loadOptions);
byId("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  loadOptions();
});
byId("examples").addEventListener("click", (event) => {
  const example = event.target.closest(".example");
  if (!example) return;
  byId("prompt").value = example.textContent;
  refresh();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(makePictures);
});
byId("copy-link").addEventListener("click", () => copy(byId("link"), byId("copy-link")));
byId("copy-curl").addEventListener("click", () => copy(byId("curl"), byId("copy-curl")));
window.addEventListener("hashchange", () => {
  restoreSettings(location.hash);
  refresh();
});
loadOptions();
