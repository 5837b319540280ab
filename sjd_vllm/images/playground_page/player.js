// Playback of the acceptance maps of all pictures on the page, forward by forward, side by side.

const PLAY_SECONDS = 10;

class Player {
  constructor() {
    this.cards = [];
    this.timer = null;
    this.play = byId("play");
    this.scrub = byId("scrub");
    this.showMap = byId("show-map");
    this.play.addEventListener("click", () => (this.timer ? this.pause() : this._start()));
    this.scrub.addEventListener("input", () => {
      this.pause();
      this.showMap.checked = true;
      this.draw();
    });
    this.showMap.addEventListener("change", () => this.draw());
    window.addEventListener("resize", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Offer playback of finished cards, or of none. */
  load(cards) {
    this.pause();
    this.cards = cards;
    this.showMap.checked = false;
    byId("player").hidden = !cards.length;
    this.numSteps = Math.max(0, ...cards.map((card) => card.bars.length));
    this.scrub.max = this.numSteps;
    this.scrub.value = this.numSteps;
    this.draw();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  draw() {
    const step = Number(this.scrub.value);
    for (const card of this.cards) card.show(step, this.showMap.checked);
    const gave = this.cards.map((card) => (step ? (card.figures.tokens_per_step[step - 1] ?? 0) : 0));
    const tokens = gave.length === 1 ? counted(gave[0], "token") : `${gave.join(" + ")} tokens`;
    byId("step").textContent = `forward ${step} of ${this.numSteps}: ${tokens}`;
    this.scrub.setAttribute("aria-valuetext", byId("step").textContent);
  }

  _start() {
    if (Number(this.scrub.value) >= this.numSteps) this.scrub.value = 0;
    this.showMap.checked = true;
    this.play.textContent = "Pause";
    const pause = Math.max(30, Math.min(300, (1000 * PLAY_SECONDS) / this.numSteps));
    this.timer = setInterval(() => {
      this.scrub.value = Number(this.scrub.value) + 1;
      this.draw();
      if (Number(this.scrub.value) >= this.numSteps) this.pause();
    }, pause);
    this.draw();
  }
}
