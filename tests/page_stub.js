// A stand-in for the document, with which tests/page_stub.py runs a page in QuickJS: elements,
// attributes, innerHTML, simple selectors, events, and a list of what is scheduled. It is strict
// where browsers forgive, and has what the pages use.
const VOID = new Set(["br", "hr", "img", "input", "link", "meta", "!doctype"]);
const ENTITIES = {amp: "&", lt: "<", gt: ">", quot: '"'};
const decode = text => text.replace(/&(#x?[0-9a-f]+|\w+);/gi, (all, name) => {
  if (name[0] == "#") return String.fromCodePoint(+name.slice(1).replace(/^x/, "0x"));
  if (name in ENTITIES) return ENTITIES[name];
  throw Error("page_stub.js does not know " + all);
});

class Node {
  parentNode = null; listeners = {};
  addEventListener(type, listener) { ((this ?? window).listeners[type] ??= []).push(listener); }
  remove() {
    const nodes = this.parentNode?.childNodes;
    nodes?.splice(nodes.indexOf(this), 1);
  }
  dispatchEvent(event) {
    event.target ??= this;
    for (let node = this; node; node = node.parentNode)
      for (const listener of [node["on" + event.type], ...node.listeners[event.type] ?? []])
        listener?.call(node, event);
  }
}

class Text extends Node {
  constructor(data) { super(); this.data = data; }
  get textContent() { return this.data; }
}

class Element extends Node {
  childNodes = []; style = {}; offsetTop = 0; offsetLeft = 0;
  constructor(tag) { super(); this.localName = tag; this.attributes = {}; }
  get clientWidth() { return innerWidth; }
  getBoundingClientRect() { return {top: 0, left: 0, bottom: 300}; }
  scrollIntoView() {}
  getAttribute(name) { return this.attributes[name] ?? null; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  get classList() {
    const classes = () => (this.getAttribute("class") ?? "").split(/\s+/).filter(Boolean);
    const write = list => this.setAttribute("class", [...new Set(list)].join(" "));
    return {
      contains: name => classes().includes(name),
      add: name => write([...classes(), name]),
      remove: name => write(classes().filter(other => other != name))};
  }
  get children() { return this.childNodes.filter(node => node instanceof Element); }
  append(node) { node.parentNode = this; this.childNodes.push(node); }
  get textContent() { return this.childNodes.map(node => node.textContent).join(""); }
  set textContent(text) { this.childNodes = []; this.append(new Text(String(text))); }
  set innerHTML(html) { this.childNodes = []; parse(String(html), this); }
  insertAdjacentHTML(where, html) {
    if (where != "beforeend") throw Error("page_stub.js inserts at beforeend only");
    parse(html, this);
  }
  matches(selector) { return paths(selector).some(path => matchesPath(this, path)); }
  closest(selector) {
    return this.matches(selector) ? this : this.parentNode?.closest?.(selector) ?? null;
  }
  querySelectorAll(selector) {
    const wanted = paths(selector);
    return descendants(this).filter(node => wanted.some(path => matchesPath(node, path)));
  }
  querySelector(selector) { return this.querySelectorAll(selector)[0] ?? null; }
  click() { stub.click(this); }
  get value() { return this.given ?? this.limited(this.getAttribute("value") ?? ""); }
  set value(value) { this.given = this.limited(String(value)); }
  limited(value) {  // a slider never holds a value outside its limits, or a fraction
    if (this.type != "range") return value;
    const [min, max] = [+(this.getAttribute("min") ?? 0), +(this.getAttribute("max") ?? 100)];
    if (value === "" || isNaN(value)) return String((min + max) / 2);
    return String(Math.round(Math.min(Math.max(+value, min), max)));
  }
}
for (const name of ["id", "name", "type", "min", "max"])
  Object.defineProperty(Element.prototype, name, {
    get() { return this.getAttribute(name) ?? ""; },
    set(value) {
      this.setAttribute(name, value);
      if (this.given != null) this.given = this.limited(this.given);
    }});

function descendants(node, found = []) {
  for (const child of node.children) {
    found.push(child);
    descendants(child, found);
  }
  return found;
}
function compound(selector) {  // "a.b#c" -> a list of tests
  const tests = [], rest = selector.replace(/([#.]?)([\w-]+)/g, (_, kind, name) => {
    if (kind == "#") tests.push(e => e.id === name);
    else if (kind == ".") tests.push(e => e.classList.contains(name));
    else tests.push(e => e.localName === name);
    return "";
  });
  if (rest || !tests.length) throw Error("page_stub.js cannot read the selector " + selector);
  return tests;
}
function paths(selector) {  // "main a, b" -> [[tests of main, tests of a], [tests of b]]
  return selector.split(",").map(part => part.trim().split(/\s+/).map(compound));
}
function matchesPath(element, path) {  // the last part is the element's, the others are ancestors'
  if (!path[path.length - 1].every(test => test(element))) return false;
  if (path.length == 1) return true;
  for (let e = element.parentNode; e instanceof Element; e = e.parentNode)
    if (matchesPath(e, path.slice(0, -1))) return true;
  return false;
}

function parse(html, root) {  // appends to root
  const attribute = /\s+[^\s=>\/]+(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s>"']+))?/.source;
  const token = new RegExp(
    `<!--[^]*?-->|<(/?)([!\\w-]+)((?:${attribute})*)\\s*(/?)>|([^<]+)|(<)`, "g");
  const pair = /([^\s=]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S+)))?/g;
  let node = root, match;
  while (match = token.exec(html)) {
    const [, end, tag, attributes, closed, text, stray] = match;
    if (stray) throw Error("a stray < in " + html.slice(match.index, match.index + 40));
    if (text != null) node.append(new Text(decode(text)));
    if (!tag) continue;
    const name = tag.toLowerCase();
    if (end) {
      if (node === root || node.localName != name)
        throw Error(`</${name}> closes <${node.localName}>`);
      node = node.parentNode;
      continue;
    }
    const element = new Element(name);
    for (const [, key, a, b, c] of attributes.matchAll(pair))
      element.attributes[key] = decode(a ?? b ?? c ?? "");
    node.append(element);
    if (name == "script" || name == "style") {  // their text is not HTML
      const stop = html.indexOf(`</${name}>`, token.lastIndex);
      element.append(new Text(html.slice(token.lastIndex, stop)));
      token.lastIndex = stop + name.length + 3;
    } else if (!closed && !VOID.has(name)) node = element;
  }
  if (node !== root) throw Error(`<${node.localName}> is not closed`);
}

const window = globalThis, document = new Element("#document");
const {addEventListener, dispatchEvent} = Node.prototype;
Object.assign(window, {listeners: {}, parentNode: null, addEventListener, dispatchEvent,
  innerWidth: 1000, innerHeight: 800});
document.parentNode = window;
document.getElementById = id => descendants(document).find(e => e.id === id) ?? null;
document.createElement = tag => new Element(tag);  // scripts that it loads are not run
const location = {hash: ""};
const history = {replaceState(_, __, address) { location.hash = address; }};
const queue = [];  // what is scheduled: [number, function]
const schedule = f => { queue.push([++stub.scheduled, f]); return stub.scheduled; };
const unschedule = id => {
  const at = queue.findIndex(([number]) => number == id);
  if (at >= 0) queue.splice(at, 1);
};
const requestAnimationFrame = schedule, cancelAnimationFrame = unschedule;
const setTimeout = schedule, clearTimeout = unschedule;
class ResizeObserver { constructor(f) { this.f = f; } observe() { schedule(this.f); } }
class Event {
  constructor(type, fields = {}) { Object.assign(this, {type, ...fields}); }
  preventDefault() {}
}
class URLSearchParams {
  constructor(from) {
    const halves = part => part.split("=").map(decodeURIComponent);
    this.pairs = typeof from == "string" ? from.split("&").filter(Boolean).map(halves)
      : Object.entries(from);
  }
  get(key) { return this.pairs.find(pair => pair[0] == key)?.[1] ?? null; }
  toString() { return this.pairs.map(pair => pair.map(encodeURIComponent).join("=")).join("&"); }
}

const stub = {
  time: 0, scheduled: 0,
  open(html, hash, width) {
    location.hash = hash;
    window.innerWidth = width;
    parse(html, document);
    document.body = document.querySelector("body");
  },
  settle(rounds) {
    for (; queue.length && rounds > 0; rounds--) {
      this.time += 16;
      for (const [, f] of queue.splice(0)) f(this.time);
    }
  },
  find(target) {
    if (typeof target != "string") return target;
    const element = document.getElementById(target) ?? document.querySelector(target);
    if (!element) throw Error("no element " + target);
    return element;
  },
  send(target, type, fields = {}) {
    (target == "window" ? window : this.find(target)).dispatchEvent(new Event(type, fields));
  },
  input(target, value) {
    this.find(target).value = value;
    this.send(target, "input");
    this.send(target, "change");
  },
  click(target) {
    const element = this.find(target);
    this.send(element, "pointerdown", {buttons: 1, offsetX: 0, clientX: 0});
    this.send(element, "click");
  },
  text(node) {
    if (node instanceof Text) return node.data;
    return /script|style/.test(node.localName) ? "" : node.childNodes.map(stub.text).join("");
  },
  content() {  // the text and all attributes and styles, but for scripts
    const values = descendants(document.body).filter(e => e.localName != "script")
      .flatMap(e => [e.attributes, e.style]).flatMap(Object.entries).flat();
    return [stub.text(document.body), ...values.map(String)].join("\n");
  },
};
