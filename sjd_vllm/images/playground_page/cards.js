// One card a picture: it grows, then tells how it was made.

class Card {
  constructor(title, size, prompt) {
    this.size = size;
    this.bars = null;
    this.figures = null;
    this.pixels = element("canvas", { width: size.width, height: size.height });
    this.overlay = element("canvas", { className: "overlay" });
    this.overlay.setAttribute("aria-hidden", "true");
    this.frame = element("div", { className: "frame" }, this.pixels, this.overlay);
    this.frame.style.aspectRatio = `${size.width} / ${size.height}`;
    this.frame.setAttribute("role", "img");
    this.frame.setAttribute("aria-label", `Picture: ${prompt}`);
    this.frame.style.setProperty("--columns", size.columns);
    this.frame.style.setProperty("--rows", size.rows);
    this.bar = element("progress", { max: size.num_tokens, value: 0, ariaLabel: "Tokens" });
    this.note = element("p", { className: "note", textContent: "waiting for the first row" });
    this.actions = element("div", { className: "card-actions" });
    const heading = title ? [element("h2", { textContent: title })] : [];
    this.root = element("figure", { className: "card" }, ...heading, this.frame);
    this.root.append(element("figcaption", {}, this.bar, this.note, this.actions));
  }

  /** Show a partial picture: the finished rows of it. */
  async grow({ b64_json, sjd }) {
    const picture = await loadedPicture(b64_json);
    if (this.figures) return; // the whole came while this one was read
    const height = Math.round((this.size.height * sjd.num_rows) / this.size.rows);
    if (height) this._paint(picture, height);
    this.bar.value = sjd.num_tokens;
    this.root.dataset.rows = sjd.num_rows;
    this.note.textContent = `row ${sjd.num_rows} of ${this.size.rows}, ${sjd.num_tokens} of ${this.size.num_tokens} tokens`;
  }

  /** Show the whole picture and its figures. */
  async finish({ b64_json, output_format, sjd }, seed, onUseSeed) {
    this.figures = sjd;
    this.b64 = b64_json;
    const picture = await loadedPicture(b64_json);
    this._paint(picture, this.size.height);
    this.bars = acceptedBars(sjd.tokens_per_step, this.size);
    this.root.dataset.rows = this.size.rows;
    this.root.classList.add("done");
    this.bar.hidden = true;
    this.note.replaceChildren(
      figure(sjd.num_steps, "forwards"),
      figure(sjd.step_compression.toFixed(1), "tokens each"),
      figure(seconds(sjd.decode_seconds), "decoding"),
    );
    const address = `data:image/${output_format};base64,${b64_json}`;
    const save = element("a", { href: address, download: `picture-${seed}.${output_format}`, textContent: "Save" });
    const use = element("button", { type: "button", className: "link", textContent: `Seed ${seed}` });
    use.title = "Put this seed into the form";
    use.addEventListener("click", () => onUseSeed(seed));
    this.actions.replaceChildren(use, save);
  }

  stop(words) {
    this.bar.hidden = true;
    this.note.textContent = words;
  }

  /** Show the picture as it was after so many forwards. */
  show(step, showsBars) {
    if (!this.bars) return;
    const now = Math.min(step, this.bars.length);
    const style = getComputedStyle(this.frame);
    const paper = { fill: style.getPropertyValue("--paper"), line: style.getPropertyValue("--line") };
    drawMap(this.overlay, this.bars, this.size, now, showsBars, paper);
  }

  _paint(picture, height) {
    const pen = this.pixels.getContext("2d");
    const scale = picture.naturalHeight / this.size.height;
    pen.drawImage(
      picture, 0, 0, picture.naturalWidth, height * scale, 0, 0, this.size.width, height,
    );
  }
}

function figure(value, name) {
  return element("span", {}, element("b", { textContent: value }), ` ${name}`);
}

async function loadedPicture(b64) {
  const picture = new Image();
  picture.src = `data:image/png;base64,${b64}`;
  await picture.decode();
  return picture;
}
