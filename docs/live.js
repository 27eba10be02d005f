// The networks of weights.js read the reader's own text on the page text.html. First the network:
// GPT of model.py with pe "rope" or "hope" and without biases, one token at a time. Every vector is
// that of the newest token; keys and values of the earlier ones are kept.
// C = n_embd channels, H = n_head heads of D = C / H channels, V = vocab_size, L = block_size.
"use strict";

// --- Weights ------------------------------------------------------------------------------------

// A tensor is the sum of its parts, each a text with a character per weight: a whole number of
// steps, 0 1 -1 2 -2 ... numbered from 0 on. The smallest ones are one byte in UTF-8.
function decodeTensor(parts) {
  const weights = new Float32Array(parts[0].text.length);
  for (const {step, text} of parts) {
    for (let i = 0; i < text.length; i++) {
      const code = text.charCodeAt(i), number = code < 127 ? code - 35 : code - 164;
      weights[i] += step * (number % 2 ? (number + 1) / 2 : -number / 2);
    }
  }
  return weights;
}

// --- Functions of vectors -----------------------------------------------------------------------

// The dot product of x (N,), N a multiple of 4, and of w from position `at` on. Four sums, since
// one would wait for itself at each step.
function dot(w, at, x) {
  let a = 0, b = 0, c = 0, d = 0;
  for (let i = 0; i < x.length; i += 4, at += 4) {
    a += w[at] * x[i];
    b += w[at + 1] * x[i + 1];
    c += w[at + 2] * x[i + 2];
    d += w[at + 3] * x[i + 3];
  }
  return a + b + c + d;
}

function multiply(matrix, x) {  // (rows, N) and (N,) -> (rows,)
  const y = new Float32Array(matrix.length / x.length);
  for (let row = 0; row < y.length; row++) y[row] = dot(matrix, row * x.length, x);
  return y;
}

const plus = (x, y) => x.map((value, i) => value + y[i]);

function layerNorm(x, weight) {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  return x.map((value, i) => (value - mean) / Math.sqrt(variance + 1e-5) * weight[i]);
}

function softmax(logits) {
  const highest = logits.reduce((a, b) => a > b ? a : b);
  const weights = logits.map(value => Math.exp(value - highest));
  const sum = weights.reduce((a, b) => a + b);
  return weights.map(value => value / sum);
}

function gelu(x) {  // x times the normal distribution function; erf by Abramowitz & Stegun 7.1.26
  const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741
    + t * (-1.453152027 + t * 1.061405429))));
  const erf = Math.sign(x) * (1 - series * Math.exp(-z * z));
  return x / 2 * (1 + erf);
}

// --- The network --------------------------------------------------------------------------------

// theta_j in radians per token, fastest first. RoPE and HoPE differ only here.
function frequencies({pe, n_embd, n_head, block_size, rope_base, hope_cutoff}) {
  const D = n_embd / n_head;
  const theta = Array.from({length: D / 2}, (_, j) => rope_base ** (-2 * j / D));
  const turns = angle => angle * block_size / (2 * Math.PI);  // within the trained context
  return pe == "hope" ? theta.filter(angle => turns(angle) >= hope_cutoff) : theta;
}

function rotate(x, position, theta, D) {  // pairs (j, j + D / 2) of each head of x (C,), in place
  theta.forEach((speed, j) => {
    const cos = Math.cos(position * speed), sin = Math.sin(position * speed);
    for (let first = j; first < x.length; first += D) {
      const a = x[first], b = x[first + D / 2];
      x[first] = a * cos - b * sin;
      x[first + D / 2] = b * cos + a * sin;
    }
  });
}

function attention(q, keys, values, D) {  // q (C,), keys and values (T, C) -> (C,)
  const y = new Float32Array(q.length);
  for (let head = 0; head < q.length; head += D) {
    const own = q.subarray(head, head + D);
    const shares = softmax(keys.map(k => dot(k, head, own) / Math.sqrt(D)));
    for (let t = 0; t < values.length; t++) {
      const v = values[t], share = shares[t];
      for (let i = head; i < head + D; i++) y[i] += share * v[i];
    }
  }
  return y;
}

class Network {
  constructor({name, config, weights}) {
    Object.assign(this, {name, config, length: 0, theta: frequencies(config)});
    this.layers = Array.from({length: config.n_layer}, () => ({keys: [], values: []}));
    this.weights = {};
    for (const key in weights) this.weights[key] = decodeTensor(weights[key]);
  }

  forget(length) {  // all but the first tokens
    this.length = Math.min(length, this.length);
    for (const layer of this.layers) layer.keys.length = layer.values.length = this.length;
  }

  read(token) {  // the next token's id -> probabilities of the one after it (V,)
    const {n_embd: C, n_head: H} = this.config, D = C / H;
    const weight = name => this.weights[`transformer.${name}.weight`];
    let x = weight("wte").slice(token * C, (token + 1) * C);
    this.layers.forEach(({keys, values}, i) => {
      const own = name => weight(`h.${i}.${name}`);
      const qkv = multiply(own("attn.c_attn"), layerNorm(x, own("ln_1")));  // (3 C,)
      const [q, k, v] = [0, C, 2 * C].map(start => qkv.slice(start, start + C));
      rotate(q, this.length, this.theta, D);
      rotate(k, this.length, this.theta, D);
      keys.push(k);
      values.push(v);
      x = plus(x, multiply(own("attn.c_proj"), attention(q, keys, values, D)));
      const hidden = multiply(own("mlp.c_fc"), layerNorm(x, own("ln_2"))).map(gelu);  // (4 C,)
      x = plus(x, multiply(own("mlp.c_proj"), hidden));
    });
    this.length++;
    return softmax(multiply(weight("wte"), layerNorm(x, weight("ln_f"))));  // the head is tied
  }
}

// --- The reader's text --------------------------------------------------------------------------

// Of the page's script: $, tint, smooth, visible, escaped, mine, count, narrow
const LIMIT = 1024;  // characters; the time grows with their number
const SAMPLE = `def read_lines(path, limit=None):
    """Read a text file and return its lines without white space."""
    lines = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if limit is not None and number >= limit:
                break
            lines.append(line.strip())
    return lines


def count_words(lines):
    counts = {}
    for line in lines:
        for word in line.split():
            counts[word] = counts.get(word, 0) + 1
    return counts
`;
const networks = NETWORKS.map(saved => new Network(saved));
const [{chars, config: {block_size: context}}] = NETWORKS;
const ownLosses = networks.map(() => [NaN]);  // the first character is given, not predicted
let characters = [], ids = [], ownSpans = [];

$("live").innerHTML = `<h2>Your own text</h2>
  <p>Change the text. ${networks.map(({name}) => escaped(name)).join(" and ")} read it in your
    browser, with the weights used above, rounded to about 8 bits; nothing is sent. Orange:
    unlikely. At most ${count(LIMIT)} characters are read. The networks know printable ASCII, tab
    and newline; all other characters are one and the same token.</p>
  <textarea id="own" rows="9" spellcheck="false" aria-label="Your own text"></textarea>
  <table id="own_table"></table>
  <svg id="own_chart" role="img" aria-label="Smoothed perplexity by position"></svg>
  <div id="own_texts"></div>`;

// Read on from the first character that has changed: what is before it is still in the caches.
function begin() {
  const before = ids, idle = isRead();
  characters = Array.from($("own").value).slice(0, LIMIT);
  ids = characters.map(c => chars.includes(c) ? chars.indexOf(c) : chars.length);
  let same = 0;
  while (same < ids.length && ids[same] == before[same]) same++;
  networks.forEach((network, i) => {
    network.forget(Math.max(0, same - 1));
    ownLosses[i].length = network.length + 1;
  });
  drawOwnTexts();
  if (idle) setTimeout(readOn);
}

const isRead = () => networks.every(({length}) => length >= ids.length - 1);

function readOn() {  // 16 characters at a time, so that the page answers
  for (let step = 0; step < 16 && !isRead(); step++) {
    networks.forEach((network, i) => {
      const next = network.length + 1, probabilities = network.read(ids[next - 1]);
      ownLosses[i].push(-Math.log(probabilities[ids[next]]));
      ownSpans[i][next].style.background = tint(ownLosses[i][next], "loss");
      ownSpans[i][next].style.opacity = 1;
    });
  }
  drawOwnTable();
  drawOwnChart();
  if (!isRead()) setTimeout(readOn);
}

function perplexity(list) {
  return list.length ? Math.exp(list.reduce((a, b) => a + b) / list.length).toFixed(2) : "–";
}

function drawOwnTable() {
  const rows = networks.map(({name}, i) => `<tr><th class="name" ${mine(i)}>${escaped(name)}</th>
    <td>${perplexity(ownLosses[i].slice(1, context + 1))}</td>
    <td>${perplexity(ownLosses[i].slice(context + 1))}</td></tr>`);
  const state = isRead() ? "perplexity" : `reading ${ownLosses[0].length} of ${ids.length}`;
  $("own_table").innerHTML = `<tr><th>${state}</th><th>within L = ${context}</th>
    <th>beyond L</th></tr>${rows.join("")}`;
}

function drawOwnTexts() {
  $("own_texts").innerHTML = networks.map(({name}, i) => {
    const marked = characters.map((c, at) => `<s class="${at == context + 1 ? "mark" : ""}"
      style="${at < ownLosses[i].length ? `background: ${tint(ownLosses[i][at], "loss")}`
        : "opacity: 0.4"}">${visible(c, true)}</s>`);  // pale: not read yet
    return `<div><h3 class="name" ${mine(i)}>${escaped(name)}</h3>
      <pre>${marked.join("")}</pre></div>`;
  }).join("");
  const spans = [...$("own_texts").querySelectorAll("s")];
  ownSpans = networks.map((_, i) => spans.slice(i * ids.length, (i + 1) * ids.length));
}

function drawOwnChart() {
  const W = $("own_chart").clientWidth, H = 90, width = 32, last = Math.max(ids.length - 1, 1);
  const curves = ownLosses.map(list => smooth(list.slice(1), width));
  const high = Math.max(1, ...curves.flat());
  const x = i => (i / last * W).toFixed(1), y = loss => ((1 - loss / high) * H).toFixed(1);
  const paths = curves.map((list, i) => list.length < 2 ? "" : `<path class="chosen" ${mine(i)}
    d="M${list.map((loss, at) => `${x(at)} ${y(loss)}`).join("L")}"/>`);
  const limit = last < context ? "" : `<line x1="${x(context)}" x2="${x(context)}" y2="${H}"/>
    <text x="${+x(context) + 3}" y="10">L</text>`;
  $("own_chart").setAttribute("height", H + 16);
  $("own_chart").innerHTML = `<line x2="${W}" y1="${H}" y2="${H}"/>${limit}${paths.join("")}
    <text x="2" y="10">${Math.exp(high).toFixed(1)}</text>
    <text y="${H + 12}">perplexity by position, over ${width} characters; bottom: 1</text>`;
}

$("own").value = SAMPLE;
$("own").oninput = begin;
addEventListener("resize", drawOwnChart);
begin();
