// The form: from the server's options, to a request's body, a link and a curl line, and back from a link.

const STRATEGY_HINTS = {
  gumbel: "gumbel: a seed gives the same picture whatever the window, plain decoding included.",
  coupled: "coupled keeps the most drafts that an exact refresh by rejection can.",
  resample: "resample draws every draft anew: plain speculative Jacobi decoding.",
  reuse: "reuse keeps a draft while its probability holds: SJD++, made exact.",
  reuse_biased: "reuse_biased is SJD++ as published. It changes the distribution; for comparison only.",
  plain: "plain decoding takes one forward a token.",
};
// Field's id, what the link calls it, where it stands in a request, and its kind.
const FIELDS = [
  { id: "prompt", path: ["prompt"], kind: "text", label: "Prompt" },
  { id: "guidance", path: ["guidance_scale"], kind: "number", label: "Guidance" },
  { id: "seed", path: ["seed"], kind: "integer", label: "Seed" },
  { id: "n", path: ["n"], kind: "integer", label: "Pictures" },
  { id: "window", path: ["sjd", "num_speculative_tokens"], kind: "integer", label: "Window" },
  { id: "strategy", path: ["sjd", "redraft"], kind: "text", label: "Strategy" },
  { id: "negative", path: ["negative_prompt"], kind: "text", label: "Negative prompt" },
  { id: "size", path: ["size"], kind: "text", label: "Size" },
  { id: "temperature", path: ["temperature"], kind: "number", label: "Temperature" },
  { id: "top-k", path: ["top_k"], kind: "integer", label: "Top-k" },
  { id: "top-p", path: ["top_p"], kind: "number", label: "Top-p" },
];

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
    const text = control.value.trim();
    if (control.validity.badInput) throw new SettingError(path.join("."), `${label} must be a number.`);
    if (!text) continue;
    const value = kind === "text" ? text : asNumber(text, kind, label, path.join("."));
    if (path.length === 1) settings[path[0]] = value;
    else (settings.sjd ??= {})[path[1]] = value;
  }
  if (!settings.prompt) throw new SettingError("prompt", "The prompt is empty. Say what to paint.");
  if (settings.sjd?.redraft === "plain") settings.sjd = { method: "none" };
  return settings;
}

function asNumber(text, kind, label, param) {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new SettingError(param, `${label} must be a number; it is “${text}”.`);
  if (kind === "integer" && !Number.isSafeInteger(value)) {
    throw new SettingError(param, `${label} must be a whole number of at most 15 digits; it is “${text}”.`);
  }
  return value;
}

/** The page's address with the form in its fragment, which no server sees. */
function settingsLink() {
  const query = new URLSearchParams();
  for (const { id } of FIELDS) {
    const value = byId(id).value.trim();
    if (value && !(id === "n" && value === "1")) query.set(id, value);
  }
  return `${location.origin}${location.pathname}#${query}`;
}

function restoreSettings(fragment) {
  const query = new URLSearchParams(fragment.replace(/^#/, ""));
  for (const { id } of FIELDS) {
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
  const call =
    `curl -sS --fail-with-body ${shellQuoted(route)} \\\n  -H 'content-type: application/json'${key} \\\n` +
    `  -d ${shellQuoted(JSON.stringify(settings))}`;
  if ((settings.n ?? 1) === 1) return `${call} |\n  jq -r '.data[0].b64_json' | base64 -d > picture.png`;
  return (
    `${call} |\n  jq -r '.data[].b64_json' |\n` +
    '  { i=0; while read -r picture; do i=$((i+1)); printf %s "$picture" | base64 -d > "picture-$i.png"; done; }'
  );
}
