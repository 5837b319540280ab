// Calls to the images API beside this page.

const API = `${location.origin}${location.pathname.replace(/\/playground\/?$/, "")}/v1/images`;
const GENERATIONS = `${API}/generations`;

/** An answer that is no success, in words; `status` is 0 where the server was not reached. */
class ServerError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

async function fetchOptions(key) {
  const answer = await call(`${API}/options`, { headers: authorization(key) });
  return answer.json();
}

/**
 * The events of one picture's stream, the last of which is the whole picture.
 * Throws ServerError; closing the iterator or aborting the signal frees the picture on the server.
 */
async function* streamPicture(settings, key, signal) {
  const body = asJson({ ...settings, stream: true, sjd: { ...settings.sjd, partial_rows: true } });
  const headers = { "content-type": "application/json", ...authorization(key) };
  const answer = await call(GENERATIONS, { method: "POST", headers, body, signal });
  for await (const data of serverSentEvents(answer.body)) {
    if (data.type === "error") throw new ServerError(500, data.error.message, data.error.param);
    yield data;
    if (data.type === "image_generation.completed") return;
  }
  throw new ServerError(0, "The connection ended before the picture was whole.");
}

async function call(address, init) {
  let answer;
  try {
    answer = await fetch(address, init);
  } catch (error) {
    throw reached(error);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const { message, param } = told.error ?? {};
  if (answer.status === 401) throw new ServerError(401, "The server wants another API key than the one given here.");
  const wait = answer.headers.get("retry-after");
  const hint = wait ? ` Try again in ${counted(Number(wait) || 1, "second")}.` : "";
  throw new ServerError(answer.status, (message ?? `The server answered with status ${answer.status}.`) + hint, param);
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw reached(error);
      });
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const line = block.split("\n").find((one) => one.startsWith("data: "));
        if (line) yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A failed fetch in words; an abort stays one. */
function reached(error) {
  if (error.name === "AbortError") return error;
  return new ServerError(0, `The server at ${location.host} cannot be reached. Is it still running?`);
}

function authorization(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}
