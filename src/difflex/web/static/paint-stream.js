// Answers of the server that come as they are made: a JSON object on each line.

// A name of this page for the server: a new request of the same name cancels the older one.
const CLIENT = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

async function problem(answer) {
  const content = await answer.text();
  try {
    return JSON.parse(content).error;
  } catch {
    return content || `The server answered ${answer.status}.`;
  }
}

// Send a request and yield the events of its answer; an error is one whose message is a sentence.
export async function* events(address, request, { signal, name = "" } = {}) {
  const body = JSON.stringify({ client: CLIENT + name, ...request });
  let answer;
  try {
    answer = await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Is difflex serve still running?");
  }
  if (!answer.ok) throw new Error(await problem(answer));
  let rest = "";
  for await (const part of parts(answer.body.pipeThrough(new TextDecoderStream()).getReader())) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.type === "error") throw new Error(event.error);
      if (event.type === "cancelled") throw new DOMException("cancelled", "AbortError");
      yield event;
    }
  }
}

async function* parts(reader) {
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

export async function getJson(address) {
  const answer = await fetch(address).catch(() => null);
  if (answer === null) throw new Error("The server does not answer. Is difflex serve still running?");
  if (!answer.ok) throw new Error(await problem(answer));
  return answer.json();
}
