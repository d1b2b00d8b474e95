// The console: asks and searches through the public API, nothing else.

const $ = (id) => document.getElementById(id);

/** An element with properties and children; text is always set as text, never as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

class ApiError extends Error {}

// --- The key, for servers that want one: sent as a header, kept until the tab is closed ------------------------------

const KEY = "adapter-bank-key";
let key = sessionStorage.getItem(KEY) ?? "";

function useKey(given) {
  key = given.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  $("metrics").hidden = Boolean(key); // a link cannot send it
}

/** The server's answer, or ApiError with a message for people. */
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) } });
  } catch {
    throw new ApiError(/^[\x21-\x7e]*$/.test(key) ? "The server cannot be reached." : "A key has no such characters.");
  }
  if (response.ok) return response;
  if (response.status === 401) $("key-box").open = true;
  const error = (await response.json().catch(() => null))?.error;
  const wait = response.headers.get("Retry-After");
  const where = error?.param ? ` (${error.param})` : "";
  throw new ApiError(`${error?.message ?? response.statusText}${where}${wait ? ` Try again in ${wait} s.` : ""}`);
}

/** {body, timing} of an API call. */
async function call(path, options) {
  const response = await request(path, options);
  return { body: await response.json().catch(() => null), timing: response.headers.get("Server-Timing") ?? "" };
}

/** Show the server's file at `path` in a picture or video. Only a script can send a key, so with one it is fetched first. */
function load(element, path) {
  if (!key) {
    element.src = path;
    return element;
  }
  request(path)
    .then((response) => response.blob())
    .then((blob) => {
      if (element.isConnected) element.src = URL.createObjectURL(blob); // else something else is shown by now
    })
    .catch((error) => {
      element.title = error.message;
    });
  return element;
}

/** Put `children` in the place of what `target` holds, and let go of the files that showed. */
function replace(target, ...children) {
  for (const { src } of target.querySelectorAll("img, video")) if (src.startsWith("blob:")) URL.revokeObjectURL(src);
  target.replaceChildren(...children);
}

const post = (path, body) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

const score = (value) => make("span", { className: "number", textContent: value.toFixed(3) });

function adapterName(adapter) {
  return adapter.name + (adapter.version === null ? "" : `@${adapter.version}`);
}

/** Where the time went: a bar of its stages, and the same in words. */
function timings(header) {
  const stages = header.split(", ").map((part) => part.match(/^(.+);dur=([\d.]+)$/)).filter(Boolean);
  const total = stages.find(([, name]) => name === "total");
  const shown = stages.filter((stage) => stage !== total);
  if (!shown.length) return "";
  const bar = make("div", { className: "timing", ariaHidden: "true" });
  shown.forEach(([, , ms], n) => {
    const part = make("i");
    part.style.flexGrow = ms;
    part.style.setProperty("--n", n % 6);
    bar.append(part);
  });
  const words = shown.map(([, name, ms]) => `${name} ${Math.round(ms)} ms`).join(" · ");
  return make("div", {}, bar, make("p", { className: "meta", textContent: `${words} · total ${Math.round(total?.[2] ?? 0)} ms` }));
}

const warnings = (list) => list.map((text) => make("p", { className: "warning", textContent: text }));

/** Run `work` while a form's button waits; show its result, or what went wrong, in `target`. */
async function submit(form, target, work) {
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    replace(target, ...(await work()));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    replace(target, make("p", { className: "error", role: "alert", textContent: error.message }));
  } finally {
    button.disabled = false;
  }
}

// --- Ask: about a file, or an item of a gallery ----------------------------------------------------------------------

let medium = null; // {file} or {gallery, item, kind}

const kindOf = (file) => (file.type.startsWith("video/") || /\.(mp4|m4v|mov|webm|mkv|avi)$/i.test(file.name) ? "video" : "image");

function shown(kind, controls = false) {
  return kind === "video"
    ? make("video", { controls, muted: true, loop: true, autoplay: true, playsInline: true })
    : make("img", { alt: "what the question is about" });
}

function takeFile(file) {
  if (!file) return;
  medium = { file };
  const preview = Object.assign(shown(kindOf(file)), { src: URL.createObjectURL(file) });
  replace($("preview"), preview, make("span", { className: "meta", textContent: file.name }));
}

function takeItem(gallery, hit, kind) {
  medium = { gallery, item: hit.id, kind };
  $("file").value = "";
  replace($("preview"), load(shown(kind), hit.media), make("span", { className: "meta", textContent: hit.id }));
  $("question").focus();
}

function decoding() {
  const mode = $("mode").value;
  if (mode === "generate") return { mode };
  if (mode === "list") return { mode: "rank" };
  return { mode: "rank", candidates: $("candidates").value.split(",").map((word) => word.trim()).filter(Boolean) };
}

async function ask() {
  if (!medium) throw new ApiError("Choose a picture or a clip first.");
  const fields = { adapter: $("adapter").value, question: $("question").value, decode: decoding() };
  const { file, gallery, item, kind } = medium;
  let reply;
  if (file) {
    const form = new FormData();
    form.append("request", JSON.stringify(fields));
    form.append(kindOf(file), file);
    reply = await call("/v1/vqa", { method: "POST", body: form });
  } else {
    reply = await post("/v1/vqa", { ...fields, [kind]: { gallery, item } });
  }
  const { answer, alternatives, adapter, warnings: notes, score: best } = reply.body;
  const others = alternatives.slice(0, 5).map((other) => make("li", {}, other.answer, score(other.score)));
  return [
    make("p", { className: "big", textContent: answer || "(no words)" }),
    make("p", { className: "meta" }, `${adapterName(adapter)} · score `, score(best)),
    ...warnings(notes),
    ...(others.length ? [make("ul", { className: "others", ariaLabel: "Other answers" }, ...others)] : []),
    timings(reply.timing),
  ];
}

// --- Search ----------------------------------------------------------------------------------------------------------

let kinds = {}; // gallery -> image, video or text

function frameBars(frames) {
  const most = Math.max(...frames.map((frame) => frame.weight));
  const text = frames.map((frame) => `${frame.time_s.toFixed(1)} s: ${Math.round(100 * frame.weight)} %`).join(", ");
  const bars = make("div", { className: "frames", role: "img", ariaLabel: `Weight of frames: ${text}`, title: text });
  for (const frame of frames) {
    const bar = make("i");
    bar.style.height = `${(100 * frame.weight) / most}%`;
    bars.append(bar);
  }
  return bars;
}

function view(kind, hit) {
  replace($("stage"), load(shown(kind, true), hit.media), make("p", { className: "meta", textContent: hit.text ?? hit.id }));
  $("viewer").showModal();
}

function hitCard(gallery, hit) {
  const kind = kinds[gallery];
  const card = make("li");
  if (hit.thumbnail) {
    const picture = make("button", { type: "button", className: "picture", ariaLabel: `Show ${hit.id}`, disabled: !hit.media });
    picture.append(load(make("img", { alt: hit.text ?? hit.id, loading: "lazy" }), hit.thumbnail));
    picture.addEventListener("click", () => view(kind, hit));
    card.append(picture);
  }
  const stages = Object.entries(hit.scores).map(([stage, value]) => `${stage} ${value.toFixed(3)}`).join(" · ");
  const text = make("div", { className: "text" }, make("p", { className: "name", textContent: hit.text ?? hit.id }));
  text.append(make("p", { className: "number", textContent: stages }));
  if (hit.frames.length > 1) text.append(frameBars(hit.frames));
  if (hit.media) {
    const button = make("button", { type: "button", className: "quiet", textContent: "Ask about this" });
    button.addEventListener("click", () => takeItem(gallery, hit, kind));
    text.append(button);
  }
  card.append(text);
  return card;
}

async function search() {
  const gallery = $("gallery").value;
  const reply = await post("/v1/retrieve", {
    gallery,
    query: { text: $("sentence").value },
    k: $("k").valueAsNumber,
    rerank: $("rerank").value,
  });
  const { hits, adapter, num_items: size, gallery_version: version, warnings: notes } = reply.body;
  return [
    make("p", { className: "meta", textContent: `${hits.length} of ${size} · version ${version} · ${adapterName(adapter)}` }),
    ...warnings(notes),
    make("ul", { className: "hits" }, ...hits.map((hit) => hitCard(gallery, hit))),
    timings(reply.timing),
  ];
}

// --- What there is ---------------------------------------------------------------------------------------------------

async function fillAdapters() {
  const { adapters } = (await call("/v1/adapters")).body;
  const options = adapters
    .filter((adapter) => adapter.tasks.includes("vqa"))
    .flatMap(({ name, aliases }) => Object.entries(aliases).map(([alias, version]) => new Option(`${name} · ${alias} (version ${version})`, `${name}@${alias}`)));
  $("adapter").replaceChildren(...options, new Option("none: the backbone alone", "__base__"));
}

async function fillGalleries() {
  const { galleries } = (await call("/v1/galleries")).body;
  kinds = Object.fromEntries(galleries.map((gallery) => [gallery.name, gallery.kind]));
  $("gallery").replaceChildren(...galleries.map(({ name, num_items: size, kind }) => new Option(`${name} · ${size} ${kind}s`, name)));
  if (!galleries.length) $("found").replaceChildren(make("p", { className: "meta", textContent: "There are no galleries yet." }));
  fillReranks();
}

/** Only what makes sense for the gallery: texts have no frames, and text is not matched against text. */
function fillReranks() {
  const kind = kinds[$("gallery").value];
  for (const option of $("rerank").options) option.disabled = kind === "text" && option.value !== "none";
  if ($("rerank").selectedOptions[0]?.disabled) $("rerank").value = "none";
}

async function showHealth() {
  const pill = $("health");
  try {
    await call("/health/ready");
    pill.textContent = "ready";
    pill.className = "pill good";
  } catch (error) {
    pill.textContent = error.message;
    pill.className = "pill bad";
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit(event.target, $("answer"), ask);
});
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  submit(event.target, $("found"), search);
});
$("mode").addEventListener("change", () => {
  const given = $("mode").value === "given";
  $("candidates-field").hidden = !given;
  $("candidates").required = given;
});
$("gallery").addEventListener("change", fillReranks);
$("file").addEventListener("change", (event) => takeFile(event.target.files[0]));
for (const [type, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (type === "drop") takeFile(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => takeFile(event.clipboardData.files[0]));
$("viewer").addEventListener("close", () => replace($("stage")));

function fillAll() {
  replace($("found"));
  for (const fill of [showHealth, fillAdapters, fillGalleries]) {
    fill().catch((error) => replace($("found"), make("p", { className: "error", role: "alert", textContent: error.message })));
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
  $("key-box").open = false;
  fillAll();
});

useKey(key);
fillAll();
setInterval(showHealth, 10_000);
