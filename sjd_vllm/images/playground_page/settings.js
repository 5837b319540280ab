// The form: from the server's options, to a request's body, a link and a curl line, and back from a link.

const STRATEGY_HINTS = {
  gumbel: "gumbel: a seed gives the same picture whatever the window, plain decoding included.",
  coupled: "coupled keeps the most drafts that an exact refresh by rejection can.",
  resample: "resample draws every draft anew: plain speculative Jacobi decoding.",
  reuse: "reuse keeps a draft while its probability holds: SJD++, made exact.",
  reuse_biased: "reuse_biased is SJD++ as published. It changes the distribution; for comparison only.",
  plain: "plain decoding takes one forward a token.",
};
// Field's id, what the link calls it, where it stands in a request, its kind, and whether a link can hold it.
const FIELDS = [
  { id: "prompt", path: ["prompt"], kind: "text", label: "Prompt" },
  { id: "guidance", path: ["guidance_scale"], kind: "number", label: "Guidance" },
  { id: "seed", path: ["seed"], kind: "seed", label: "Seed" },
  { id: "n", path: ["n"], kind: "integer", label: "Pictures" },
  { id: "window", path: ["sjd", "num_speculative_tokens"], kind: "integer", label: "Window" },
  { id: "strategy", path: ["sjd", "redraft"], kind: "text", label: "Strategy" },
  { id: "negative", path: ["negative_prompt"], kind: "text", label: "Negative prompt" },
  { id: "size", path: ["size"], kind: "text", label: "Size" },
  { id: "temperature", path: ["temperature"], kind: "number", label: "Temperature" },
  { id: "top-k", path: ["top_k"], kind: "integer", label: "Top-k" },
  { id: "top-p", path: ["top_p"], kind: "number", label: "Top-p" },
  { id: "init-image", path: ["init_image"], kind: "file", label: "Picture to start from", isLocal: true },
  { id: "keep-rows", path: ["keep_rows"], kind: "integer", label: "Rows to keep", isLocal: true },
];
const LINKED_FIELDS = FIELDS.filter(({ isLocal }) => !isLocal);

// The picture to start from: its file's name and its contents in base64; null without one.
let givenPicture = null;

/** A setting that cannot be sent; `param` is what the server would call it. */
class SettingError extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

/** The form's field for a name in a request, if it has one. */
function fieldOf(param) {
  const name = param === "sjd.method" ? "sjd.redraft" : param;
  return FIELDS.find((field) => field.path.join(".") === name);
}

function fillForm(options) {
  const { defaults } = options;
  byId("guidance").placeholder = defaults.guidance_scale;
  byId("temperature").placeholder = defaults.temperature;
  byId("top-k").placeholder = defaults.top_k || "all";
  byId("top-p").placeholder = defaults.top_p;
  byId("window").placeholder = defaults.num_speculative_tokens;
  byId("window-hint").textContent = `Window: 0 to ${defaults.num_speculative_tokens} drafts; if empty, the engine's choice.`;
  byId("n").max = options.max_n;
  byId("strategy").replaceChildren(
    new Option(`${defaults.redraft} (default)`, ""),
    ...options.redrafts.filter((name) => name !== defaults.redraft).map((name) => new Option(name, name)),
    new Option("plain", "plain"),
  );
  byId("size").replaceChildren(...options.sizes.map(({ size }, index) => new Option(size, index ? size : "")));
  byId("examples").replaceChildren(
    ...options.examples.map((text) =>
      element("li", {}, element("button", { type: "button", className: "example", textContent: text, title: text })),
    ),
  );
  byId("examples-field").hidden = !options.examples.length;
  byId("start-fields").hidden = byId("start-hint").hidden = !options.init_image;
}

/** Read the file that was chosen. Its rows to keep are half of the picture's, where the form does not say. */
async function readGivenPicture(size) {
  const [file] = byId("init-image").files;
  givenPicture = null;
  if (!file) return;
  const reader = new FileReader();
  const done = new Promise((resolve, reject) => {
    reader.onload = resolve;
    reader.onerror = () => reject(new SettingError("init_image", "The file cannot be read."));
  });
  reader.readAsDataURL(file);
  await done;
  givenPicture = { name: file.name, base64: reader.result.slice(reader.result.indexOf(",") + 1) };
  byId("keep-rows").value ||= Math.floor(size.rows / 2);
}

function showStartHint(size) {
  byId("start-hint").textContent =
    `The picture keeps its upper rows of image tokens, of which there are ${size.rows}; the model paints the others.`;
}

function showStrategyHint(options) {
  const name = byId("strategy").value || options.defaults.redraft;
  byId("strategy-hint").textContent = STRATEGY_HINTS[name] ?? "";
}

/** The request's body, with absent fields left out. Throws SettingError for what is no number. */
function readSettings() {
  const settings = {};
  for (const { id, path, kind, label } of FIELDS) {
    const control = byId(id);
    const text = kind === "file" ? (givenPicture?.base64 ?? "") : control.value.trim();
    if (control.validity.badInput) throw new SettingError(path.join("."), `${label} must be a number.`);
    if (!text) continue;
    const value = kind === "text" || kind === "file" ? text : asNumber(text, kind, label, path.join("."));
    if (path.length === 1) settings[path[0]] = value;
    else (settings.sjd ??= {})[path[1]] = value;
  }
  if (!settings.prompt) throw new SettingError("prompt", "The prompt is empty. Say what to paint.");
  if (settings.sjd?.redraft === "plain") settings.sjd = { method: "none" };
  return settings;
}

function asNumber(text, kind, label, param) {
  // A seed has up to 63 bits, of which a number of JavaScript would lose some.
  if (kind === "seed" && /^\d+$/.test(text)) return BigInt(text);
  if (kind === "seed") throw new SettingError(param, `${label} must be a whole number; it is “${text}”.`);
  const value = Number(text);
  if (!Number.isFinite(value)) throw new SettingError(param, `${label} must be a number; it is “${text}”.`);
  if (kind === "integer" && !Number.isSafeInteger(value)) {
    throw new SettingError(param, `${label} must be a whole number of at most 15 digits; it is “${text}”.`);
  }
  return value;
}

/** A request's body in JSON, with every digit of its seed. */
function asJson({ seed, ...settings }) {
  const text = JSON.stringify(settings);
  return seed === undefined ? text : `{"seed":${seed},${text.slice(1)}`;
}

/** The page's address with the form in its fragment, which no server sees. */
function settingsLink() {
  const query = new URLSearchParams();
  for (const { id } of LINKED_FIELDS) {
    const value = byId(id).value.trim();
    if (value && !(id === "n" && value === "1")) query.set(id, value);
  }
  return `${location.origin}${location.pathname}#${query}`;
}

function restoreSettings(fragment) {
  const query = new URLSearchParams(fragment.replace(/^#/, ""));
  for (const { id } of LINKED_FIELDS) {
    const control = byId(id);
    const value = query.get(id) ?? (id === "n" ? "1" : "");
    // A name that this server does not know is shown, and the server says what it knows.
    const isKnown = !control.options || [...control.options].some((option) => option.value === value);
    if (!isKnown) control.add(new Option(value, value));
    control.value = value;
  }
  const hidden = ["negative", "temperature", "top-k", "top-p", "size"];
  byId("more").open ||= hidden.some((id) => query.has(id));
}

/** One command that makes the same pictures with curl and jq. */
function curlLine(settings, route, needsKey) {
  const key = needsKey ? ' \\\n  -H "authorization: Bearer $API_KEY"' : "";
  const { init_image, ...others } = settings;
  const json = asJson(others);
  // A picture is too long for a word of a command, so it comes through a pipe.
  const source = init_image
    ? `{ printf %s ${shellQuoted(`${json.slice(0, -1)},"init_image":"`)}\n` +
      `  base64 -w0 ${shellQuoted(`./${givenPicture.name}`)}\n  printf '"}'; } |\n`
    : "";
  const call =
    `${source}curl -sS --fail-with-body ${shellQuoted(route)} \\\n  -H 'content-type: application/json'${key} \\\n` +
    `  -d ${init_image ? "@-" : shellQuoted(json)}`;
  if ((settings.n ?? 1) === 1) return `${call} |\n  jq -r '.data[0].b64_json' | base64 -d > picture.png`;
  return (
    `${call} |\n  jq -r '.data[].b64_json' |\n` +
    '  { i=0; while read -r picture; do i=$((i+1)); printf %s "$picture" | base64 -d > "picture-$i.png"; done; }'
  );
}
