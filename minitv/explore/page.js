"use strict";
// Draws the page from the JSON in it. What comes from files is written as text, never as HTML.
(() => {
  const { runs } = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)"), fine = matchMedia("(pointer: fine)").matches;
  const redraw = []; // one function for each plot that is shown

  // -- small things
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colours = () => [0, 1, 2, 3, 4, 5, 6, 7].map((i) => css("--c" + i));
  const esc = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // plotly reads tags
  const seen = (word) => word.replace(/\n/g, "⏎").replace(/ /g, "␣");
  const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(4)));
  const percent = (p) => (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %";
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const table = (heads, rows, caption) => {
    const element = make("table"), head = element.createTHead().insertRow(), body = element.createTBody();
    if (caption) element.prepend(make("caption", caption, { class: "away" }));
    heads.forEach((text, i) => head.append(make("th", text, { scope: "col", class: i ? "number" : "" })));
    for (const cells of rows) {
      const row = body.insertRow();
      cells.forEach((cell, i) => row.append(make("td", typeof cell === "number" ? short(cell) : cell,
        { class: typeof cell === "number" ? "number" : "" })));
    }
    return element;
  };
  const later = (details, build) => details.addEventListener("toggle", () => {
    const box = details.querySelector(".scroll");
    if (details.open) box.replaceChildren(build());
  });
  const floats = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  };
  const start = (axis) => ("HCDKV".includes(axis) ? 1 : 0); // heads and channels are counted from 1, positions from 0
  const matrix = (values, rows, columns, first = 0) =>
    Array.from({ length: rows }, (_, t) => values.subarray(first + t * columns, first + (t + 1) * columns));

  // -- plots
  const draw = (box, traces, layout = {}) => {
    const axis = (own) => ({ gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true,
      ...own, title: { text: own && own.title, standoff: 6 } });
    const show = () => Plotly.react(box, traces(), {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 12, t: 8, b: 40 },
      font: { color: css("--ink"), size: 12, family: "system-ui, sans-serif" }, colorway: colours(),
      hoverlabel: { bgcolor: css("--card"), font: { color: css("--ink") }, bordercolor: css("--line") },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, entrywidth: 0, font: { size: 11 } }, dragmode: fine ? "zoom" : false, ...layout,
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), shapes: layout.shapes ? layout.shapes() : [],
      annotations: layout.annotations ? layout.annotations() : [],
    }, { responsive: true, displaylogo: false, displayModeBar: false });
    box.redraw = show;
    if (!redraw.includes(box)) redraw.push(box);
    return show();
  };
  const rgb = (colour) => {
    const n = parseInt(colour.slice(1), 16);
    return [n >> 16, (n >> 8) & 255, n & 255];
  };
  const root = (x) => Math.sign(x) * Math.sqrt(Math.abs(x));
  const heat = (box, values, rows, columns, { words, negative, scaled = true, unit = "weight", sides = ["t", "s"], titles = ["position that reads", "position that is read"], starts = [0, 0], mark, first = 0 }) => {
    const z = matrix(values, rows, columns, first);
    const text = z.map((row, t) => Array.from(row, (x, s) =>
      `${sides[0]} = ${t + starts[0]}${words.rows ? " " + esc(seen(words.rows[t])) : ""}, ` +
      `${sides[1]} = ${s + starts[1]}${words.columns ? " " + esc(seen(words.columns[s])) : ""}<br>${unit} ${short(x)}`));
    const top = z.reduce((most, row) => row.reduce((a, x) => Math.max(a, Math.abs(x)), most), 0) || 1;
    const look = scaled ? root : (x) => x;
    const few = (n) => n <= 24;
    const axis = (title, list, n) => ({ title, showgrid: false, zeroline: false, constrain: "domain",
      ...(list && few(n) ? { tickvals: [...Array(n).keys()], ticktext: list.slice(0, n).map((w) => esc(seen(w))), tickangle: 0 } : n <= 12 ? { dtick: 1 } : {}) });
    return draw(box, () => [{
      type: "heatmap", x0: starts[1], y0: starts[0], z: z.map((row) => Array.from(row, look)), text, hovertemplate: "%{text}<extra></extra>", showscale: false,
      zmin: negative ? -look(top) : 0, zmax: look(top),
      colorscale: negative ? [[0, css("--less")], [0.5, css("--zero")], [1, css("--more")]] : [[0, css("--zero")], [1, css("--more")]],
    }], {
      xaxis: axis(`${sides[1]}: ${titles[1]}`, words.columns, columns),
      yaxis: { ...axis(`${sides[0]}: ${titles[0]}`, words.rows, rows), autorange: "reversed",
        ...(rows === columns ? { scaleanchor: "x" } : {}) },
      margin: { l: 44, r: 6, t: 6, b: 40 },
      shapes: () => (mark === undefined ? [] : [{ type: "rect", x0: -0.5, x1: columns - 0.5, y0: mark - 0.5, y1: mark + 0.5,
        line: { color: css("--mark"), width: 1.5 } }]),
    });
  };
  const lines = (box, series, x, y, layout = {}) => draw(box, () => series.map((one, i) => ({
    type: "scatter", mode: one.mode || (one.x.length < 3 ? "lines+markers" : "lines"), name: esc(one.name), x: one.x, y: one.y,
    line: { width: one.width || 2, dash: one.dash, color: one.colour === undefined ? colours()[i % 8] : colours()[one.colour % 8] },
    opacity: one.opacity || 1, showlegend: one.legend !== false, hovertemplate: `%{y:.5g}<extra>${esc(one.name)}, %{x}</extra>`,
  })), { xaxis: { title: x }, yaxis: { title: y }, ...layout });

  // -- learning curves, of all runs
  const curves = () => {
    const panel = document.getElementById("curves"), having = runs.filter((run) => run.curve);
    if (!having.length) {
      panel.hidden = true;
      return;
    }
    const { metric, rising } = having[0].curve, same = having.filter((run) => run.curve.metric === metric), series = [], rows = [];
    same.forEach((run, i) => {
      const { training, held_out: held } = run.curve;
      if (training[0].length && same.length === 1) series.push({ name: "training, smoothed", x: training[0], y: training[1], colour: i, width: 1, opacity: 0.6 });
      if (held[0].length) series.push({ name: same.length > 1 ? run.name : "held out", x: held[0], y: held[1], colour: i, mode: "lines+markers" });
      else if (same.length > 1 && training[0].length) series.push({ name: run.name + ", training", x: training[0], y: training[1], colour: i, width: 1 });
      const last = (held[0].length ? held : training)[1].at(-1);
      if (last !== undefined) rows.push([`${run.name} (${run.variant}), last ${held[0].length ? "held out" : "training"}`, last]);
    });
    const alike = same.every((run) => JSON.stringify(run.curve.baselines) === JSON.stringify(same[0].curve.baselines));
    const bases = alike ? Object.entries(same[0].curve.baselines).sort((a, b) => a[1] - b[1]) : [];
    const values = [...bases.map((base) => base[1]), ...series.flatMap((one) => one.mode ? one.y : one.y.slice(Math.floor(one.y.length / 4)))];
    const low = Math.min(...values), high = Math.max(...values), pad = 0.06 * (high - low || 1);
    const box = panel.querySelector(".plot"), wide = box.clientWidth > 600;
    lines(box, series, "optimizer step", `${esc(metric)} (${rising ? "higher" : "lower"} is better)`, {
      yaxis: { title: esc(metric), range: [low - pad, high + pad] }, margin: { l: 52, r: 12, t: 8, b: 44 },
      shapes: () => bases.map(([, value]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value,
        line: { color: css("--soft"), width: 1, dash: "dot" } })),
      annotations: () => bases.filter(() => wide).map(([name, value], i) => ({ xref: "paper", x: 1 - 0.19 * (i % 5), xanchor: "right", y: value, yanchor: "middle",
        showarrow: false, text: esc(name), font: { size: 11, color: css("--soft") }, bgcolor: css("--card") })),
    });
    const data = [...new Set(same.map((run) => run.curve.data).filter(Boolean))];
    panel.querySelector(".note").textContent = `Each line shows the ${metric}; ${rising ? "higher" : "lower"} is better. ` +
      (bases.length ? `Dotted lines are baselines, what counting or guessing reaches without a network${wide ? "" : `: ${bases.map(([name, value]) => `${name} ${short(value)}`).join(", ")}`}. ` : "") +
      (data.length > 1 ? "The runs have different data, so their heights do not compare: " : data.length ? "The data: " : "") +
      data.join("; ") + (data.length ? "." : "") +
      (same.length < having.length ? ` Not drawn, because they are measured otherwise: ${having.filter((run) => !same.includes(run)).map((run) => run.name).join(", ")}.` : "");
    later(panel.querySelector("details"), () => table(["", metric], [...rows, ...bases], "Last values and baselines"));
  };

  // -- one side: the panels of a run
  class Side {
    constructor(name) {
      this.name = name;
      this.box = document.getElementById("side-" + name);
      const chooser = document.getElementById("run-" + name);
      if (chooser) {
        chooser.value = String(Math.min(name === "a" ? 0 : 1, runs.length - 1));
        chooser.addEventListener("change", () => this.show(+chooser.value));
      }
      this.call = this.of("mixing").querySelector(".call");
      this.head = this.of("mixing").querySelector(".head");
      this.scale = this.of("mixing").querySelector(".scale");
      this.row = this.of("mixing").querySelector(".row");
      this.call.addEventListener("change", () => this.mixing(+this.call.value, 0));
      this.head.addEventListener("change", () => this.mixing(+this.call.value, +this.head.value));
      this.scale.addEventListener("change", () => this.mixing(+this.call.value, +this.head.value));
      this.row.addEventListener("input", () => this.mark(+this.row.value));
      this.text();
      later(this.of("text").querySelector("details"), () => this.tokens());
      later(this.of("state").querySelector("details"), () => table(["tokens", "bytes"],
        this.run.state.tokens.map((n, i) => [n, this.run.state.bytes[i]]), "Bytes of the state"));
      this.show(chooser ? +chooser.value : 0);
    }

    of(panel) {
      return document.getElementById(`${panel}-${this.name}`);
    }

    show(number) {
      const run = (this.run = runs[number]);
      document.getElementById("title-" + this.name).textContent = runs.length > 1 ? `${run.name}: ${run.variant}` : run.variant;
      const facts = this.box.querySelector(".facts");
      facts.replaceChildren(...run.facts.flatMap(([label, text]) => [make("dt", label), make("dd", text)]));
      this.fill();
      const layers = run.mixings.map((one, i) => make("option", this.label(one), { value: i }));
      this.call.replaceChildren(...layers);
      this.of("mixing").hidden = this.of("distance").hidden = !run.mixings.length;
      if (run.mixings.length) {
        this.glance();
        this.marked = undefined;
        const most = Math.max(...run.mixings.map((one) => (one.whole ? one.seen : 0))); // the first that mixes most
        this.mixing(run.mixings.findIndex((one) => one.whole && one.seen === most), 0);
      } else this.of("inputs").hidden = true;
      this.influence();
      this.state();
      this.readings();
      this.of("sample").hidden = !run.sample;
      const sample = this.of("sample").querySelector("pre");
      sample.textContent = run.sample || "";
      sample.className = (run.sample || "").split("\n").every((line) => line.length <= 80) ? "lines" : ""; // pictures do not wrap
      this.of("missing").hidden = !run.missing.length;
      this.of("missing").querySelector("ul").replaceChildren(...run.missing.map((text) => make("li", text)));
      for (const details of this.box.querySelectorAll("details[open]")) details.open = false;
      if (run.text) this.go(run.text.items.findLastIndex((item) => item.row === 0 && item.bits !== undefined), true);
    }

    label(one) {
      const place = one.place.replace(/^blocks\./, "").split(".").map((part) => (/^\d+$/.test(part) ? +part + 1 : part)).join(" ");
      return `${place}: ${one.title}`;
    }

    // -- the text
    text() {
      const box = document.getElementById("tokens-" + this.name);
      const go = (i, alone = false) => {
        const spans = box.querySelectorAll("span");
        if (!spans.length) return;
        this.at = Math.max(0, Math.min(spans.length - 1, i));
        for (const one of box.querySelectorAll(".on")) {
          one.classList.remove("on");
          one.removeAttribute("aria-selected");
        }
        const span = spans[this.at];
        span.classList.add("on");
        span.setAttribute("aria-selected", "true");
        box.setAttribute("aria-activedescendant", span.id);
        this.say(this.run.text.items[this.at]);
        const same = (side) => side !== this && side.run && side.run.text && side.run.text.items.length === spans.length;
        if (!alone) for (const side of sides) if (same(side)) side.go(this.at, true);
      };
      this.go = go;
      box.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9 }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        go((this.at === undefined ? -1 : this.at) + step);
        const span = box.querySelectorAll("span")[this.at];
        if (span.offsetTop < box.scrollTop || span.offsetTop + 30 > box.scrollTop + box.clientHeight) box.scrollTop = span.offsetTop - 40;
      });
      const point = (event) => {
        const span = event.target.closest("span");
        if (span && span.parentElement === box) go([...box.querySelectorAll("span")].indexOf(span));
      };
      box.addEventListener("mouseover", point);
      box.addEventListener("click", point);
    }

    fill() {
      const panel = this.of("text"), text = this.run.text, box = document.getElementById("tokens-" + this.name);
      panel.hidden = !text;
      this.at = undefined;
      if (!text) return;
      const wide = text.items.some((item) => item.word.length > 1);
      box.replaceChildren(...text.items.flatMap((item, i) => {
        const span = make("span", item.word === "\n" ? "⏎\n" : item.word, { id: `token-${this.name}-${i}`, role: "option" });
        if (wide) span.className = "wide";
        if (item.bits !== undefined) span.style.backgroundColor = `rgba(${css("--warm")}, ${Math.min(item.bits / 8, 1) * 0.75})`;
        return i && item.row !== text.items[i - 1].row ? [make("hr", undefined, { "aria-hidden": "true" }), span] : [span];
      }));
      panel.querySelector(".note").textContent = (text.mean === null ? "" :
        "The redder a token, the more it surprised the model. A token that was given the probability p costs log2(1/p) bits: " +
        `1 bit for 1/2, 2 bits for 1/4, 8 bits for 1/256. ${text.asked} tokens cost ${short(text.mean)} bits each on average. `) +
        `Shown: ${text.about}.` + (text.items.some(({ word, bits }) => bits !== undefined && /\s/.test(word)) ? " ␣ is a space, ⏎ a new line." : "");
      panel.querySelector(".said").replaceChildren();
    }

    say(item) {
      const said = this.of("text").querySelector(".said"), name = (word) => `“${seen(word)}”`;
      if (item.bits === undefined) {
        said.replaceChildren(make("p", `${name(item.word)}: nothing is asked here.`));
        return;
      }
      const rest = item.likely[0][0] === item.answer ? ", and it is what the model would have said." : `; the model would have said ${name(item.likely[0][0])}.`;
      said.replaceChildren(make("p", `${name(item.answer)} cost ${item.bits.toFixed(2)} bits: probability ${percent(item.p)}${rest}`));
      const likely = table(["likeliest", "probability"], item.likely.map(([word, p]) => [seen(word), percent(p)]), "The likeliest tokens");
      [...likely.tBodies[0].rows].forEach((row, i) => row.cells[1].append(" ", make("span", "", { class: "bar", style: `width:${5 * item.likely[i][1]}rem` })));
      said.append(likely);
      if (item.row === 0 && item.at >= 0 && this.run.mixings.length) this.mark(item.at);
    }

    tokens() {
      const items = this.run.text.items.filter((item) => item.bits !== undefined);
      return table(["token", "bits", "probability", "the model would have said"],
        items.map((item) => [seen(item.answer), item.bits, item.p, item.likely.map(([word, p]) => `${seen(word)} ${percent(p)}`).join(", ")]),
        "Each token with what the model says");
    }

    // -- matrices
    values(one) {
      return (one.floats = one.floats || floats(one.values));
    }

    words(one) {
      const words = this.run.words;
      return { rows: words[one.rows], columns: words[one.columns] };
    }

    mixing(call, head) {
      const one = this.run.mixings[call], [rows, columns] = one.shape, panel = this.of("mixing");
      this.now = one;
      this.matrix = Math.min(head, one.names.length - 1);
      this.call.value = String(call);
      this.head.replaceChildren(...one.names.map((name, i) => make("option", name, { value: i })));
      this.head.value = String(this.matrix);
      const sums = one.sums[0] === one.sums[1] || one.sums[1] - one.sums[0] < 1e-6 ? `Each row adds up to ${short(one.sums[1])}.` :
        `Rows add up to ${short(one.sums[0])} … ${short(one.sums[1])}.`;
      panel.querySelector(".law").textContent = `The operator: ${one.about} M times the values of this example gives its output, with an ` +
        `error of ${one.error.toExponential(0)} at most. ${sums}` +
        (one.blocks > 1 ? ` The ${one.blocks} blocks are sequences that do not read each other.` : "") +
        (rows < one.rows || columns < one.columns ? ` The first ${rows} of ${one.rows} rows and ${columns} of ${one.columns} columns are shown.` : "");
      this.row.max = String(rows - 1);
      const strong = dark.matches ? "bright" : "dark";
      panel.querySelector(".pick .hint").textContent = (one.negative ?
        `Blue is added, orange is subtracted; the stronger the colour, the more. ` : `The ${strong}er a cell, the more is taken. `) +
        `A row of many pale cells takes a little from many positions, and a column of ${strong} cells is read by many. ` +
        "Press a row to read its numbers.";
      for (const button of panel.querySelectorAll(".glance button"))
        button.setAttribute("aria-pressed", String(button.dataset.call === String(call) && button.dataset.head === String(this.matrix)));
      this.mark(this.marked === undefined ? rows - 1 : this.marked);
      this.distance();
      this.inputs();
    }

    mark(row) {
      const one = this.now, [rows, columns] = one.shape;
      this.marked = Math.max(0, Math.min(row, rows - 1));
      const box = this.of("mixing").querySelector(".plot"), words = this.words(one);
      heat(box, this.values(one), rows, columns, { words, negative: one.negative, scaled: this.scale.value === "root",
        mark: this.marked, first: this.matrix * rows * columns });
      if (!box.listens) {
        box.listens = true;
        box.on("plotly_click", (event) => this.mark(event.points[0].y));
      }
      this.row.value = String(this.marked);
      const quoted = (list, i) => (list ? ` “${seen(list[i])}”` : "");
      this.of("mixing").querySelector("output").textContent = `${this.marked}${quoted(words.rows, this.marked)}`;
      const start = (this.matrix * rows + this.marked) * columns, weights = Array.from(this.values(one).subarray(start, start + columns));
      const order = weights.map((w, s) => [w, s]).filter(([w]) => w).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 5);
      this.of("mixing").querySelector(".rowtable").replaceChildren(order.length ? table(["largest weights at", "weight"],
        order.map(([w, s]) => [`s = ${s}${quoted(words.columns, s)}`, w]), "The largest weights of the row") : make("p", "This row is empty."));
    }

    glance() {
      const box = this.of("mixing").querySelector(".glance");
      box.replaceChildren(...this.run.mixings.map((one, call) => {
        const row = make("div");
        one.names.forEach((name, head) => {
          const button = make("button", undefined, { type: "button", "data-call": call, "data-head": head, title: name,
            "aria-label": `${this.label(one)}, ${name}` });
          const canvas = make("canvas", undefined, { "aria-hidden": "true" });
          canvas.paint = () => this.paint(canvas, one, head);
          canvas.paint();
          button.append(canvas);
          button.addEventListener("click", () => this.mixing(call, head));
          row.append(button);
        });
        const group = make("section", undefined, { class: "group", "aria-label": this.label(one) });
        group.append(make("p", this.label(one)), row);
        return group;
      }));
      box.previousElementSibling.textContent = "Press one to enlarge it. The numbers count layers." +
        (this.run.mixings.some((one) => one.title.endsWith(" alone")) ? " “Alone” is one operator without those around it, such as gates." : "") +
        (box.scrollHeight > box.clientHeight + 2 ? " Scroll for more." : "");
    }

    paint(canvas, one, head) {
      const [rows, columns] = one.shape, values = this.values(one), first = head * rows * columns;
      canvas.width = columns;
      canvas.height = rows;
      const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
      const zero = rgb(css("--zero")), more = rgb(css("--more")), less = rgb(css("--less"));
      let top = 1e-30;
      for (let i = 0; i < rows * columns; i++) top = Math.max(top, Math.abs(values[first + i]));
      for (let i = 0; i < rows * columns; i++) {
        const x = root(values[first + i] / top), end = x < 0 ? less : more;
        for (let c = 0; c < 3; c++) image.data[4 * i + c] = zero[c] + (end[c] - zero[c]) * Math.abs(x);
        image.data[4 * i + 3] = 255;
      }
      context.putImageData(image, 0, 0);
    }

    distance() {
      const one = this.now, panel = this.of("distance"), [far, spectrum, read] = panel.querySelectorAll(".plot"), d = one.distances;
      const each = (list, x, legend) => list.map((y, i) => ({ name: one.names[i], x, y, legend }));
      far.hidden = spectrum.hidden = !d;
      const ways = d && d.toeplitz ? "The weights depend on the distance t - s alone, so this is a filter. First it is drawn over distances" :
        "First the mean of |M| is drawn at each distance t - s";
      panel.querySelector(".note").textContent = (d ? `${ways}, then as a spectrum: the gain is large at frequency 0 where neighbours ` +
        "are averaged, and at 0.5 where they are subtracted. The last plot says" : "The plot says") +
        " how much each position is read, on average over the positions that may read it.";
      if (d) {
        lines(far, each(d.weights, d.lags), "distance t - s", "weight");
        lines(spectrum, each(d.gains, d.frequencies, false), "frequency, cycles for each position", "gain");
      }
      lines(read, each(one.read, one.read[0].map((_, s) => s), !d), "position s", "mean of |M|");
    }

    inputs() {
      const one = this.now, panel = this.of("inputs"), drawn = panel.querySelector(".drawn");
      panel.hidden = !one.inputs.length;
      panel.querySelector(".note").textContent = `${one.signature}. Letters in brackets are axes; T and S are positions. ` +
        "Drawn is what is the same for every sequence" + (one.inputs.some((input) => input.matrix) ? "; blue is above 0, orange below." : ".");
      for (const old of drawn.querySelectorAll(".plot")) redraw.splice(redraw.indexOf(old), redraw.includes(old) ? 1 : 0);
      drawn.replaceChildren();
      for (const input of one.inputs) {
        const box = make("div", undefined, { class: "plot", role: "img", "aria-label": input.name });
        drawn.append(make("h4", `${input.name}[${input.axes.join(" ")}]`), box);
        if (input.values) {
          const x = input.values.map((_, i) => i + start(input.axes[0]));
          draw(box, () => [{ type: input.values.length > 32 ? "scatter" : "bar", mode: "markers", x, y: input.values, marker: { color: colours()[0] },
            hovertemplate: "%{x}: %{y:.6g}<extra></extra>" }], { xaxis: { title: input.axes[0], ...(x.length <= 16 ? { dtick: 1 } : {}) }, yaxis: {} });
          if (input.values.length <= 16) {
            const details = make("details"), scroll = make("div", undefined, { class: "scroll" });
            details.append(make("summary", "As a table"), scroll);
            later(details, () => table([input.axes[0], input.name], x.map((i, at) => [String(i), input.values[at]]), input.name));
            drawn.append(details);
          }
        } else if (input.integers) {
          const map = input.integers[Math.min(this.matrix, input.integers.length - 1)];
          draw(box, () => [{ type: "heatmap", z: map, showscale: false, hovertemplate: `${esc(input.axes[1])} %{x}, ${esc(input.axes[0])} %{y}: %{z}<extra></extra>`,
            colorscale: colours().map((colour, i) => [i / 7, colour]) }],
            { xaxis: { title: input.axes[1], showgrid: false }, yaxis: { title: input.axes[0], dtick: 1, autorange: "reversed", showgrid: false } });
        } else {
          const values = floats(input.matrix);
          heat(box, values, ...input.shape, { words: {}, negative: values.some((x) => x < 0), scaled: false, unit: input.name, sides: input.axes,
            starts: input.axes.map(start) });
          Plotly.relayout(box, { "xaxis.title.text": input.axes[1], "yaxis.title.text": input.axes[0], "yaxis.scaleanchor": null });
        }
      }
    }

    influence() {
      const panel = this.of("influence"), { influence } = this.run;
      panel.hidden = !influence;
      if (!influence) return;
      panel.querySelector(".note").textContent = "Each token s is replaced by another one. The colour says how much probability this moves in " +
        `the prediction at position t. The prediction at position ${influence.last} moves by more than 1 % for tokens up to ` +
        `${influence.far} position${influence.far === 1 ? "" : "s"} away.`;
      const words = this.run.words[String(influence.rows)];
      heat(panel.querySelector(".plot"), floats(influence.matrix), influence.rows, influence.columns,
        { words: { rows: words, columns: words }, negative: false, unit: "change", titles: ["prediction after", "token that is changed"] });
    }

    state() {
      const panel = this.of("state"), { state } = this.run;
      panel.hidden = !state;
      if (!state) return;
      panel.querySelector(".note").textContent = "What the model keeps of a text to write the next token.";
      lines(panel.querySelector(".plot"), [{ name: "bytes", x: state.tokens, y: state.bytes, mode: "lines+markers", legend: false }], "tokens", "bytes",
        { yaxis: { title: "bytes", rangemode: "tozero" } });
    }

    readings() {
      const panel = this.of("readings"), { readings } = this.run;
      panel.hidden = !readings.length;
      if (!readings.length) return;
      lines(panel.querySelector(".plot"), readings.flatMap(({ name, layers }, colour) => layers.map(([x, y], i) =>
        ({ name, x, y, colour, width: 1.2, legend: i === 0 }))), "optimizer step", "value");
    }
  }

  curves();
  const sides = [];
  for (const name of runs.length > 1 ? ["a", "b"] : ["a"]) sides.push(new Side(name));
  dark.addEventListener("change", () => {
    for (const box of redraw) box.redraw();
    for (const canvas of document.querySelectorAll(".glance canvas")) canvas.paint();
    for (const side of sides) {
      const { at, marked } = side;
      if (side.run.text) side.fill();
      if (at !== undefined) side.go(at, true);
      side.marked = marked;
      if (side.run.mixings.length) side.mixing(+side.call.value, side.matrix);
    }
  });
  document.documentElement.dataset.ready = "yes";
})();
