// A stand-in for the document, with which tests/page_stub.py runs a page in QuickJS: elements, attributes, innerHTML,
// simple selectors, events, and a list of what is scheduled. It is strict where browsers forgive.
const VOID = new Set(["area", "br", "col", "hr", "img", "input", "link", "meta", "wbr", "!doctype"]);
const ENTITIES = {amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", thinsp: "\u2009", minus: "\u2212",
  times: "\u00d7",
  theta: "\u03b8", pi: "\u03c0", le: "\u2264", ge: "\u2265", middot: "\u00b7", ndash: "\u2013"};
const decode = text => text.replace(/&(#x?[0-9a-f]+|\w+);/gi, (all, name) => {
  if (name[0] == "#") return String.fromCodePoint(name[1] == "x" ? parseInt(name.slice(2), 16) : +name.slice(1));
  if (name in ENTITIES) return ENTITIES[name];
  throw Error("page_stub.py does not know " + all);
});
const encode = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");
const camel = name => name.replace(/-(\w)/g, (_, letter) => letter.toUpperCase());
const dashed = name => name.replace(/[A-Z]/g, letter => "-" + letter.toLowerCase());

class Node {
  parentNode = null; listeners = {};
  get parentElement() { return this.parentNode; }
  addEventListener(type, listener) { ((this ?? window).listeners[type] ??= []).push(listener); }
  remove() {
    const nodes = this.parentNode?.childNodes;
    nodes?.splice(nodes.indexOf(this), 1);
  }
  dispatchEvent(event) {
    event.target ??= this;
    for (let node = this; node && !event.stopped; node = node.parentNode) {
      event.currentTarget = node;
      for (const listener of [node["on" + event.type], ...node.listeners[event.type] ?? []])
        listener?.call(node, event);
      if (event.type == "toggle" || event.type == "pointerenter" || event.type == "pointerleave") break;
    }
    return !event.defaultPrevented;
  }
}

class Text extends Node {
  constructor(data) { super(); this.data = data; }
  get textContent() { return this.data; }
}

class Element extends Node {
  childNodes = []; scrollTop = 0; scrollHeight = 500; offsetTop = 0; offsetLeft = 0; clientHeight = 300;
  offsetHeight = 20; offsetWidth = 8; scrollWidth = 0;
  constructor(tag) { super(); this.localName = tag; this.attributes = {}; }
  get tagName() { return this.localName.toUpperCase(); }
  get clientWidth() { return innerWidth; }
  getBoundingClientRect() {
    return {top: 0, left: 0, right: innerWidth, bottom: 300, width: innerWidth, height: 300, x: 0, y: 0};
  }
  scrollIntoView() {} focus() { document.activeElement = this; } blur() {} setPointerCapture() {}
  getAttribute(name) { return this.attributes[name] ?? null; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  removeAttribute(name) { delete this.attributes[name]; }
  hasAttribute(name) { return name in this.attributes; }
  toggleAttribute(name, on = !this.hasAttribute(name)) {
    on ? this.setAttribute(name, "") : this.removeAttribute(name);
    return on;
  }
  get dataset() {
    return new Proxy(this, {get: (e, key) => e.attributes["data-" + dashed(key)],
                            set: (e, key, value) => (e.setAttribute("data-" + dashed(key), value), true)});
  }
  get style() {
    return this.styles ??= {
      setProperty(name, value) { this[camel(name)] = String(value); },
      getPropertyValue(name) { return this[camel(name)] ?? ""; },
      removeProperty(name) { delete this[camel(name)]; }};
  }
  get classList() {
    const classes = () => (this.getAttribute("class") ?? "").split(/\s+/).filter(Boolean);
    const write = list => this.setAttribute("class", [...new Set(list)].join(" "));
    return {
      contains: name => classes().includes(name),
      add: (...names) => write([...classes(), ...names]),
      remove: (...names) => write(classes().filter(name => !names.includes(name))),
      toggle(name, on = !this.contains(name)) { on ? this.add(name) : this.remove(name); return on; }};
  }
  get children() { return this.childNodes.filter(node => node instanceof Element); }
  get firstElementChild() { return this.children[0] ?? null; }
  get lastElementChild() { return this.children.slice(-1)[0] ?? null; }
  sibling(step) { const all = this.parentNode?.children ?? []; return all[all.indexOf(this) + step] ?? null; }
  get previousElementSibling() { return this.sibling(-1); }
  get nextElementSibling() { return this.sibling(1); }
  append(...nodes) {
    for (let node of nodes) {
      if (!(node instanceof Node)) node = new Text(String(node));
      node.remove(); node.parentNode = this; this.childNodes.push(node);
    }
  }
  appendChild(node) { this.append(node); return node; }
  replaceChildren(...nodes) { this.childNodes = []; this.append(...nodes); }
  get textContent() { return this.childNodes.map(node => node.textContent).join(""); }
  set textContent(text) { this.replaceChildren(String(text)); }
  get innerHTML() { return this.childNodes.map(stub.html).join(""); }
  set innerHTML(html) { this.childNodes = []; parse(String(html), this); }
  insertAdjacentHTML(where, html) {
    if (where != "beforeend") throw Error("page_stub.py inserts at beforeend only");
    parse(html, this);
  }
  matches(selector) { return paths(selector).some(path => matchesPath(this, path)); }
  closest(selector) { return this.matches(selector) ? this : this.parentNode?.closest?.(selector) ?? null; }
  querySelectorAll(selector) {
    const wanted = paths(selector);
    return descendants(this).filter(node => wanted.some(path => matchesPath(node, path)));
  }
  querySelector(selector) { return this.querySelectorAll(selector)[0] ?? null; }
  getElementsByTagName(tag) { return this.querySelectorAll(tag); }
  click() { stub.click(this); }
  get value() {
    if (this.localName == "select") {
      const chosen = this.chosen ?? this.querySelector("option[selected]") ?? this.querySelector("option");
      return chosen?.value ?? "";
    }
    if (this.localName == "option") return this.getAttribute("value") ?? this.textContent;
    return this.given ?? this.limited(this.getAttribute("value") ?? "");
  }
  set value(value) {
    const same = option => option.value == String(value);
    if (this.localName == "select") this.chosen = this.querySelectorAll("option").find(same);
    else this.given = this.limited(String(value));
  }
  limited(value) {  // a slider never holds a value outside its limits, or between its steps
    if (this.localName != "input" || this.getAttribute("type") != "range") return value;
    const get = (name, usual) => this.getAttribute(name) ?? usual, [min, max] = [+get("min", 0), +get("max", 100)];
    const step = get("step", 1);
    if (value === "" || isNaN(value)) return String((min + max) / 2);
    const x = Math.min(Math.max(+value, min), max);
    return String(step == "any" ? x : +(min + Math.round((x - min) / +step) * +step).toPrecision(12));
  }
  get valueAsNumber() { return +this.value; }
  get checked() { return this.on ?? this.hasAttribute("checked"); }
  set checked(on) {
    if (on && this.type == "radio") for (const other of document.body.querySelectorAll("input"))
      if (other.type == "radio" && other.name == this.name) other.on = false;
    this.on = Boolean(on);
  }
}
const REFLECTED = ["id", "title", "name", "type", "min", "max", "step", "lang", "className", "htmlFor", "tabIndex"];
for (const name of REFLECTED) {
  const attribute = {className: "class", htmlFor: "for", tabIndex: "tabindex"}[name] ?? name;
  Object.defineProperty(Element.prototype, name, {
    get() { return this.getAttribute(attribute) ?? ""; },
    set(value) {
      this.setAttribute(attribute, value);
      if (this.given != null) this.given = this.limited(this.given);
    }});
}
for (const name of ["hidden", "disabled", "open", "selected"]) Object.defineProperty(Element.prototype, name, {
  get() { return this.hasAttribute(name); },
  set(on) { this.toggleAttribute(name, Boolean(on)); }});

function descendants(node, found = []) {
  for (const child of node.childNodes) if (child instanceof Element) { found.push(child); descendants(child, found); }
  return found;
}
function withId(node, id) {
  for (const child of node.childNodes) if (child instanceof Element) {
    const found = child.attributes.id === id ? child : withId(child, id);
    if (found) return found;
  }
  return null;
}
const compounds = {};
function compound(selector) {  // "a.b#c[d=e]:checked" -> a list of tests
  if (compounds[selector]) return compounds[selector];
  const tests = [], part = /([#.]?)([\w-]+|\*)|\[([\w-]+)(?:="?([^\]"]*)"?)?\]|:(checked)/g;
  const rest = selector.replace(part, (_, kind, name, attribute, value, checked) => {
    if (checked) tests.push(e => e.checked);
    else if (attribute && value == null) tests.push(e => e.hasAttribute(attribute));
    else if (attribute) tests.push(e => e.getAttribute(attribute) === value);
    else if (kind == "#") tests.push(e => e.id === name);
    else if (kind == ".") tests.push(e => e.classList.contains(name));
    else tests.push(e => name == "*" || e.localName === name);
    return "";
  });
  if (rest || !tests.length) throw Error("page_stub.js cannot read the selector " + selector);
  return compounds[selector] = tests;
}
function paths(selector) {  // "main a, b" -> [["main", "a"], ["b"]]
  const found = selector.split(",").map(part => part.trim().split(/\s+/));
  found.flat().forEach(compound);  // throws if it cannot read it
  return found;
}
function matchesPath(element, path) {  // the last part is the element's, the others are ancestors'
  if (!compound(path[path.length - 1]).every(test => test(element))) return false;
  if (path.length == 1) return true;
  for (let e = element.parentNode; e instanceof Element; e = e.parentNode)
    if (matchesPath(e, path.slice(0, -1))) return true;
  return false;
}

function parse(html, root) {  // appends to root
  const attribute = /\s+[^\s=>\/]+(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s>"']+))?/.source;
  const token = new RegExp(`<!--[^]*?-->|<(/?)([!\\w-]+)((?:${attribute})*)\\s*(/?)>|([^<]+)|(<)`, "g");
  let node = root, match;
  while (match = token.exec(html)) {
    const [, end, tag, attributes, closed, text, stray] = match;
    if (stray) throw Error("a stray < in " + html.slice(match.index, match.index + 40));
    if (text != null) node.append(new Text(decode(text)));
    if (!tag) continue;
    const name = tag.toLowerCase();
    if (end) {
      if (node === root || node.localName != name) throw Error(`</${name}> closes <${node.localName}>`);
      node = node.parentNode;
      continue;
    }
    const element = new Element(name);
    for (const [, key, a, b, c] of attributes.matchAll(/([^\s=]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S+)))?/g))
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
Object.assign(window, {listeners: {}, parentNode: null, addEventListener: Node.prototype.addEventListener,
  removeEventListener() {}, dispatchEvent: Node.prototype.dispatchEvent, innerWidth: 1000, innerHeight: 800, scrollY: 0,
  devicePixelRatio: 1, scrollTo() {}, scrollBy() {}});
document.parentNode = window;
document.getElementById = id => withId(document, id);
document.createElement = tag => new Element(tag);
document.createTextNode = text => new Text(text);
document.createElementNS = (_, tag) => new Element(tag);
const location = {hash: "", search: "", pathname: "/page.html"};
const history = {replaceState: (_, __, address) => { location.hash = address.slice(address.indexOf("#")); }};
const matchMedia = () => ({matches: false, addEventListener() {}});
const getComputedStyle = element => element.style;
const console = {log() {}, warn() {}, error(...words) { throw Error(words.join(" ")); }};
const performance = {now: () => stub.time};
const queue = [];  // what is scheduled: [number, function]
const schedule = f => { queue.push([++stub.scheduled, f]); return stub.scheduled; };
const unschedule = id => {
  const at = queue.findIndex(([number]) => number == id);
  if (at >= 0) queue.splice(at, 1);
};
const requestAnimationFrame = schedule, cancelAnimationFrame = unschedule;
const setTimeout = schedule, clearTimeout = unschedule;
class ResizeObserver { constructor(f) { this.f = f; } observe() { schedule(this.f); } disconnect() {} }
class IntersectionObserver extends ResizeObserver { constructor(f) { super(() => {}); } }
class Event { constructor(type, fields = {}) { Object.assign(this, {type, ...fields}); }
  preventDefault() { this.defaultPrevented = true; } stopPropagation() { this.stopped = true; } }
class URLSearchParams {
  constructor(from = "") {
    const parts = typeof from == "string" ? from.replace(/^[?#]/, "").split("&").filter(Boolean) : null;
    const halves = part => part.match(/^([^=]*)=?([^]*)$/).slice(1).map(URLSearchParams.decode);
    this.pairs = parts ? parts.map(halves) : Array.isArray(from) ? from : Object.entries(from);
  }
  static decode(text) {  // what is no code stays as it is, as in browsers
    try { return decodeURIComponent(text.replace(/\+/g, " ")); } catch { return text; }
  }
  get(key) { return this.pairs.find(pair => pair[0] == key)?.[1] ?? null; }
  has(key) { return this.get(key) != null; }
  set(key, value) { this.pairs = [...this.pairs.filter(pair => pair[0] != key), [key, String(value)]]; }
  entries() { return this.pairs; }
  [Symbol.iterator]() { return this.pairs[Symbol.iterator](); }
  toString() {
    const encoded = text => encodeURIComponent(text).replace(/%20/g, "+");
    return this.pairs.map(pair => pair.map(encoded).join("=")).join("&");
  }
}
globalThis.Intl = {NumberFormat: class { format(x) { return String(x); } }};
const atob = text => {
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  let out = [], bits = 0, held = 0;
  for (const letter of text.replace(/[\s=]/g, "")) {
    held = held << 6 | letters.indexOf(letter); bits += 6;
    if (bits >= 8) { bits -= 8; out.push(String.fromCharCode(held >> bits & 255)); held &= (1 << bits) - 1; }
  }
  return out.join("");
};

const stub = {
  time: 0, scheduled: 0,
  open(html, hash, width) {
    location.hash = hash; window.innerWidth = width;
    parse(html, document);
    document.documentElement = document.querySelector("html");
    document.head = document.querySelector("head") ?? document.documentElement;
    document.body = document.querySelector("body") ?? document.documentElement;
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
    const event = new Event(type, {...fields, bubbles: true});
    (target == "window" ? window : this.find(target)).dispatchEvent(event);
    return event;
  },
  input(target, value) {
    const element = this.find(target);
    element.value = value;
    this.send(element, "input"); this.send(element, "change");
  },
  click(target) {
    const element = this.find(target), type = element.getAttribute("type");
    if (element.disabled) return;
    const changes = element.localName == "input" && (type == "radio" || type == "checkbox");
    if (changes) element.checked = type == "radio" || !element.checked;
    this.send(element, "pointerdown", {buttons: 1, offsetX: 0, clientX: 0, clientY: 0});
    const event = this.send(element, "click");
    if (changes) { this.send(element, "input"); this.send(element, "change"); }
    else if (element.closest("summary") && !event.defaultPrevented) {
      const details = element.closest("details");
      details.open = !details.open; this.send(details, "toggle");
    }
  },
  text(node) {
    if (node instanceof Text) return node.data;
    return ["script", "style"].includes(node.localName) ? "" : node.childNodes.map(stub.text).join("");
  },
  html(node) {  // scripts and styles are not content
    if (node instanceof Text) return encode(node.data);
    if (["script", "style"].includes(node.localName)) return "";
    const styles = Object.entries(node.styles ?? {}).filter(([, value]) => typeof value == "string");
    const style = styles.map(([key, value]) => `${key}: ${value}`).join("; ");
    const attributes = Object.entries(style ? {...node.attributes, style} : node.attributes);
    const tag = attributes.map(([key, value]) => ` ${key}="${encode(value)}"`).join("");
    return `<${node.localName}${tag}>${node.childNodes.map(stub.html).join("")}</${node.localName}>`;
  },
};
