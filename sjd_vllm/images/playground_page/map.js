// The acceptance map: each run of image tokens that one forward gave, as bars over the picture.

/** Where each forward's tokens lie: for each forward a list of {row, first, end} in columns. */
function acceptedBars(tokensPerStep, size) {
  const bars = [];
  // the tokens of given rows come first, and no forward gave them
  let position = size.num_tokens - tokensPerStep.reduce((sum, count) => sum + count, 0);
  for (const count of tokensPerStep) {
    const runs = [];
    for (const end = position + count; position < end; position++) {
      const offset = position - size.first_position;
      const row = Math.floor(offset / size.row_stride);
      const column = offset - row * size.row_stride;
      if (row < 0 || row >= size.rows || column >= size.columns) continue; // a forced token, such as end of line
      const last = runs.at(-1);
      if (last?.row === row) last.end = column + 1;
      else runs.push({ row, first: column, end: column + 1 });
    }
    bars.push(runs);
  }
  return bars;
}

/** From blue over green to orange with the forwards, neighbours light and dark in turn. */
function stepColour(step, numSteps) {
  const hue = 250 - 225 * (step / Math.max(numSteps - 1, 1));
  return `hsl(${hue} 85% ${step % 2 ? 66 : 48}%)`;
}

/**
 * Draw the first `step` forwards.
 *
 * What came later is covered with `paper`, its colours of fill and line; with `showsBars` the newest forward stands out.
 */
function drawMap(canvas, bars, size, step, showsBars, paper) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const cell = { width: width / size.columns, height: height / size.rows };
  const gap = Math.min(1.5, cell.width / 8);
  for (const { row, first, end } of bars.slice(step).flat()) {
    pen.fillStyle = paper.fill;
    pen.fillRect(first * cell.width, row * cell.height, (end - first) * cell.width + 0.5, cell.height + 0.5);
    pen.fillStyle = paper.line;
    pen.fillRect(first * cell.width, row * cell.height, (end - first) * cell.width, 1);
    for (let column = first; column < end; column++) pen.fillRect(column * cell.width, row * cell.height, 1, cell.height);
  }
  if (!showsBars) return;
  const isPlaying = step < bars.length;
  bars.slice(0, step).forEach((runs, index) => {
    const isNewest = isPlaying && index === step - 1;
    pen.globalAlpha = isNewest ? 0.95 : 0.62;
    pen.fillStyle = stepColour(index, bars.length);
    for (const { row, first, end } of runs) {
      pen.beginPath();
      pen.roundRect(
        first * cell.width + gap,
        row * cell.height + cell.height * 0.16,
        (end - first) * cell.width - 2 * gap,
        cell.height * 0.68,
        Math.min(cell.height * 0.3, 6),
      );
      pen.fill();
      pen.globalAlpha = isNewest ? 1 : 0.5;
      pen.lineWidth = isNewest ? 2 : 1;
      pen.strokeStyle = isNewest ? "#fff" : "rgb(0 0 0 / 0.65)";
      pen.stroke();
      pen.globalAlpha = isNewest ? 0.95 : 0.62;
    }
  });
  pen.globalAlpha = 1;
}
