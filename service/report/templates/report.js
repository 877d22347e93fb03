"use strict";
// The page's own script: plots in the page's colours, the utterances with their filters, tables that can be sorted.
// Transcripts are strangers' words: they come from JSON and go into the page as text nodes alone.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const STEP = 20; // utterances that are shown at a time
  const MOST_COLUMNS = 150; // words of one that are shown at first
  const LONGEST = 60; // characters of a word beside others; "as written" has all of them
  const NOTHING = 0, SAME = 1; // see service/report/align.py

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const cut = (word) => (word.length > LONGEST ? word.slice(0, LONGEST - 1) + "…" : word);
  const percent = (rate) => (100 * rate).toFixed(1) + "%";
  const grouped = (number) => number.toLocaleString("en-US");
  const counted = (number, one) => grouped(number) + " " + one + (number === 1 ? "" : "s");

  // ---- Plots ----------------------------------------------------------------------------------------------------

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)");

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue("--" + name.slice(1)).trim();
  }

  // A copy in which "@name" is that colour of the page.
  function coloured(value, colour) {
    if (typeof value === "string") return /^@[a-z]+\d?$/.test(value) ? colour(value) : value;
    if (Array.isArray(value)) return value.map((one) => coloured(one, colour));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one, colour)]));
  }

  function axis(own, colour) {
    const shared = { gridcolor: colour("@grid"), zerolinecolor: colour("@grid"), linecolor: colour("@axis"), automargin: true };
    const title = own.title ? { title: { standoff: 8, ...own.title, font: { size: 12 } } } : {};
    return { ...shared, ...own, ...title };
  }

  function layoutOf(figure, colour) {
    const own = coloured(figure.layout, colour);
    return {
      margin: { l: 12, r: 16, t: 12, b: 12 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      dragmode: "zoom",
      ...own,
      ...(touch.matches ? { dragmode: false } : {}),
      xaxis: axis(own.xaxis || {}, colour),
      yaxis: axis(own.yaxis || {}, colour),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("@text") },
      hoverlabel: { bgcolor: colour("@surface"), bordercolor: colour("@axis"), font: { color: colour("@text") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("@axis"), activecolor: colour("@text") },
      selections: [],
    };
  }

  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "autoScale2d"] };
  const figures = new Map(page.figures.map((figure) => [figure.id, figure]));

  function draw(figure) {
    const place = document.getElementById(figure.id);
    if (!place || !window.Plotly) return;
    const colour = colours();
    place.dataset.drawn = dark.matches && !document.documentElement.dataset.printing ? "dark" : "light";
    return Plotly.react(place, coloured(figure.data, colour), layoutOf(figure, colour), CONFIG);
  }

  // A plot is drawn when it comes near the window, so that a page of many plots opens at once.
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watch.unobserve(entry.target);
      const figure = figures.get(entry.target.id);
      draw(figure);
      if (figure.id === "parallel-coordinates") chooseTrials(entry.target);
    }
  }, { rootMargin: "800px" });
  for (const id of figures.keys()) {
    const place = document.getElementById(id);
    if (place) watch.observe(place);
  }
  function drawAgain() {
    for (const figure of figures.values()) {
      if (document.getElementById(figure.id)?.dataset.drawn) draw(figure);
    }
  }
  dark.addEventListener("change", drawAgain);
  // Paper is white: printed in the light dress, and every plot, however far from the window.
  window.addEventListener("beforeprint", () => {
    document.documentElement.dataset.printing = "true";
    figures.forEach(draw);
  });
  window.addEventListener("afterprint", () => {
    delete document.documentElement.dataset.printing;
    drawAgain();
  });

  // A box over an axis of the parallel coordinates keeps the trials that pass through it, here and in the table.
  function chooseTrials(place) {
    const table = document.getElementById("trials");
    const said = document.querySelector("#search .chosen");
    const dim = (kept) => {
      Plotly.restyle(place, { opacity: place.data.map((trace) => (!kept || kept.has(trace.meta) ? 1 : 0.06)) });
      for (const row of table ? table.tBodies[0].rows : []) row.hidden = Boolean(kept) && !kept.has(row.dataset.id);
      if (!said) return;
      said.hidden = !kept;
      said.textContent = kept ? counted(kept.size, "trial") + " in the chosen range. A double click on the plot shows all." : "";
    };
    place.on("plotly_selected", (event) => {
      if (!event || !event.range && !event.points.length && !(event.selections || []).length) return;
      const boxes = event.selections || [];
      const chosen = new Map(); // axis -> the trials that pass through its boxes
      for (const trace of place.data) {
        trace.x.forEach((x, index) => {
          for (const box of boxes) {
            const [left, right] = [box.x0, box.x1].map(Number).sort((a, b) => a - b);
            const [low, high] = [box.y0, box.y1].map(Number).sort((a, b) => a - b);
            if (x < left || x > right) continue;
            if (!chosen.has(x)) chosen.set(x, new Set());
            if (trace.y[index] >= low && trace.y[index] <= high) chosen.get(x).add(trace.meta);
          }
        });
      }
      if (!chosen.size) return;
      const all = place.data.map((trace) => trace.meta);
      dim(new Set(all.filter((id) => [...chosen.values()].every((some) => some.has(id)))));
    });
    place.on("plotly_deselect", () => dim(null));
    place.on("plotly_doubleclick", () => dim(null));
  }

  // ---- Tables ---------------------------------------------------------------------------------------------------

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        sortRows(table, column, rising);
      });
    });
  }

  function sortRows(table, column, rising) {
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const key = row.cells[column].dataset.key;
      const number = key === "inf" ? Infinity : key.trim() === "" ? NaN : Number(key);
      return { row, key, number };
    });
    const numeric = keyed.every((one) => !Number.isNaN(one.number));
    keyed.sort((one, other) => {
      if (!numeric) return (rising ? 1 : -1) * one.key.localeCompare(other.key, "en", { numeric: true });
      // What has no value stands last in either order.
      if (one.number === other.number) return 0;
      if (one.number === Infinity) return 1;
      if (other.number === Infinity) return -1;
      return (rising ? 1 : -1) * (one.number - other.number);
    });
    table.tBodies[0].append(...keyed.map((one) => one.row));
  }

  // ---- Utterances -----------------------------------------------------------------------------------------------

  // One list of utterances with its filters.
  class Utterances {
    constructor(root, source) {
      this.root = root;
      this.source = source;
      this.form = root.querySelector("form");
      this.list = root.querySelector(".list");
      this.more = root.querySelector(".more");
      this.pair = null; // {kind, words}: only utterances with this very error
      this.onLanguage = () => {};
      const select = this.form.elements.language;
      for (const [code, name] of Object.entries(source.languages)) select.append(new Option(name, code));
      if (Object.keys(source.languages).length < 2) select.closest("label").hidden = true;
      this.form.addEventListener("submit", (event) => event.preventDefault());
      let waiting;
      this.form.addEventListener("input", (event) => {
        clearTimeout(waiting);
        waiting = setTimeout(() => this.apply(), event.target.name === "text" ? 120 : 0);
        if (event.target.name === "language") this.onLanguage(event.target.value);
      });
      this.more.addEventListener("click", () => this.show(STEP, true));
      root.querySelector(".pair button").addEventListener("click", () => this.only(null));
      this.apply();
    }

    last(clip) { return clip.e[clip.e.length - 1]; }
    change(clip) { return this.last(clip) - clip.e[0]; }
    rate(clip) { return clip.w ? this.last(clip) / clip.w : this.last(clip) ? 1 : 0; }

    matches(clip, wanted) {
      if (wanted.language && clip.l !== wanted.language) return false;
      if (wanted.change === "worse" && this.change(clip) <= 0) return false;
      if (wanted.change === "better" && this.change(clip) >= 0) return false;
      if (wanted.change === "same" && this.change(clip) !== 0) return false;
      if (wanted.change === "wrong" && this.last(clip) === 0) return false;
      if (this.pair && !this.has(clip, this.pair)) return false;
      if (!wanted.text) return true;
      clip.search ??= [clip.p, clip.r, ...clip.h, ...clip.a.flat().filter((cell) => typeof cell === "string")].join("\n").toLowerCase();
      // The words as they are written, or as they were compared, one after another.
      clip.spoken ??= [0, ...clip.e.keys()].map((side, index) => clip.a
        .map((column) => (index === 0 ? column[0] : column[side + 1] === SAME ? column[0] : column[side + 1]))
        .filter((cell) => typeof cell === "string").join(" ")).join("\n").toLowerCase();
      return clip.search.includes(wanted.text) || clip.spoken.includes(wanted.text);
    }

    has(clip, { kind, words }) {
      return clip.a.some((column) => {
        const said = column[0], heard = column[column.length - 1];
        if (kind === "substituted") return said === words[0] && heard === words[1];
        if (kind === "deleted") return said === words[0] && heard === NOTHING;
        return said === NOTHING && heard === words[0];
      });
    }

    only(pair) {
      this.pair = pair;
      const place = this.root.querySelector(".pair");
      place.hidden = !pair;
      if (pair) {
        const [one, other] = pair.words.map(cut);
        const text = { substituted: `“${one}” heard as “${other}”`, deleted: `“${one}” not heard`, inserted: `“${one}” heard, not said` };
        place.querySelector("span").textContent = "Only utterances with " + text[pair.kind] + ".";
      }
      this.apply();
    }

    apply() {
      const fields = this.form.elements;
      const wanted = { language: fields.language.value, text: fields.text.value.trim().toLowerCase(), change: fields.change.value };
      const order = {
        errors: (one, other) => this.last(other) - this.last(one),
        rate: (one, other) => this.rate(other) - this.rate(one) || this.last(other) - this.last(one),
        lost: (one, other) => this.change(other) - this.change(one),
        won: (one, other) => this.change(one) - this.change(other),
        long: (one, other) => other.d - one.d,
      }[fields.order.value];
      this.found = this.source.clips.filter((clip) => this.matches(clip, wanted)).sort(order);
      this.list.replaceChildren();
      this.shown = 0;
      this.show(STEP, false);
    }

    show(count, moveFocus) {
      const next = this.found.slice(this.shown, this.shown + count);
      const rows = next.map((clip) => this.row(clip));
      this.list.append(...rows);
      this.shown += next.length;
      this.more.hidden = this.shown >= this.found.length;
      const all = this.source.clips.length;
      const of = this.found.length === all ? counted(all, "utterance") : `${grouped(this.found.length)} that match, of ${counted(all, "utterance")}`;
      this.root.querySelector(".count").textContent = this.found.length ? `${grouped(this.shown)} shown of ${of}` : `None of ${counted(all, "utterance")} matches.`;
      if (moveFocus && rows.length) { rows[0].tabIndex = -1; rows[0].focus({ preventScroll: true }); }
    }

    row(clip) {
      const row = element("li");
      const meta = element("div", "meta");
      const name = element("span", "file");
      name.append(element("bdi", "", clip.p));
      meta.append(name);
      if (Object.keys(this.source.languages).length > 1) meta.append(element("span", "", this.source.languages[clip.l]));
      meta.append(element("span", "", clip.d.toFixed(1) + " s"));
      const errors = clip.e.map((count, side) => `${this.source.sides[side]} ${grouped(count)}`).join(", ");
      meta.append(element("span", "", `errors: ${errors} in ${counted(clip.w, "word")}`));
      meta.append(element("span", "", "WER " + clip.e.map((count) => percent(clip.w ? count / clip.w : count ? 1 : 0)).join(" → ")));
      if (clip.e.length > 1 && this.change(clip)) meta.append(element("span", this.change(clip) > 0 ? "worse" : "better", this.change(clip) > 0 ? "worse" : "better"));
      row.append(meta, this.aligned(clip), this.written(clip));
      return row;
    }

    // Reference and hypotheses under each other, word by word; the lines break where the window ends.
    aligned(clip) {
      const rtl = this.source.rtl.includes(clip.l);
      const made = element("div", "aligned");
      const names = element("div", "names");
      names.setAttribute("aria-hidden", "true");
      for (const name of ["said", ...this.source.sides]) names.append(element("span", "", name));
      const words = element("div", "words");
      words.dir = rtl ? "rtl" : "auto";
      if (clip.l) words.lang = clip.l;
      const fill = (columns) => words.append(...columns.map((column) => this.column(column)));
      fill(clip.a.slice(0, MOST_COLUMNS));
      if (clip.a.length > MOST_COLUMNS) {
        const rest = element("button", "rest", `… ${counted(clip.a.length - MOST_COLUMNS, "more word")}`);
        rest.type = "button";
        rest.addEventListener("click", () => { rest.remove(); fill(clip.a.slice(MOST_COLUMNS)); });
        words.append(rest);
      }
      made.append(names, words);
      return made;
    }

    column([said, ...sides]) {
      const made = element("div", "word");
      made.append(said === NOTHING ? element("span", "", " ") : element("span", "ref", cut(said)));
      sides.forEach((heard, side) => {
        const place = element("span");
        const name = this.source.sides[side];
        if (heard === SAME) {
          place.className = "same";
          place.textContent = cut(said);
        } else if (heard === NOTHING && said === NOTHING) {
          place.textContent = " ";
        } else {
          const kind = heard === NOTHING ? "d" : said === NOTHING ? "i" : "s";
          const mark = element("mark", kind, cut(heard === NOTHING ? said : heard));
          mark.title = { d: `${name}: not heard`, i: `${name}: heard, not said`, s: `${name}: heard in its place` }[kind];
          place.append(mark);
        }
        made.append(place);
      });
      return made;
    }

    // The texts as they stand in the files, made when they are asked for.
    written(clip) {
      const made = element("details");
      made.append(element("summary", "", "as written"));
      made.addEventListener("toggle", () => {
        if (made.children.length > 1) return;
        [["said", clip.r], ...clip.h.map((text, side) => [this.source.sides[side], text])].forEach(([name, text]) => {
          const line = element("p");
          line.append(element("strong", "", name + ": "), element("bdi", "", text || "(nothing)"));
          made.append(line);
        });
      });
      return made;
    }
  }

  // ---- Frequent errors ------------------------------------------------------------------------------------------

  const KINDS = { substituted: "Heard as another word", deleted: "Not heard", inserted: "Heard, not said" };
  const FEW = 10;

  function showConfusions(place, source, list) {
    let language = "";
    const open = new Set();
    const fill = () => {
      const found = source.confusions[language] || {};
      place.replaceChildren();
      for (const [kind, title] of Object.entries(KINDS)) {
        const rows = found[kind] || [];
        const block = element("div");
        block.append(element("h4", "", title));
        if (!rows.length) { block.append(element("p", "note", "none")); place.append(block); continue; }
        const table = element("table");
        const head = table.createTHead().insertRow();
        for (const [index, name] of ["", ...source.sides.filter((_, side) => side === 0 || side === source.sides.length - 1)].entries()) {
          const cell = element("th", index ? "number" : "", name);
          cell.scope = "col";
          head.append(cell);
        }
        const body = table.createTBody();
        for (const [words, counts] of rows.slice(0, open.has(kind) ? rows.length : FEW)) {
          const row = body.insertRow();
          const button = element("button", "pairing");
          button.type = "button";
          button.append(element("bdi", "", cut(words[0])));
          if (words.length > 1) button.append(" → ", element("bdi", "", cut(words[1])));
          button.addEventListener("click", () => {
            list.only({ kind, words });
            list.root.scrollIntoView({ block: "start" });
          });
          row.insertCell().append(button);
          for (const count of counts) {
            const cell = row.insertCell();
            cell.className = "number";
            cell.textContent = grouped(count);
          }
        }
        block.append(table);
        if (rows.length > FEW) {
          const toggle = element("button", "link", open.has(kind) ? "fewer" : `all ${rows.length}`);
          toggle.type = "button";
          toggle.addEventListener("click", () => { open.has(kind) ? open.delete(kind) : open.add(kind); fill(); });
          block.append(toggle);
        }
        place.append(block);
      }
    };
    list.onLanguage = (code) => { language = code; fill(); };
    fill();
  }

  for (const root of document.querySelectorAll(".utterances")) {
    const source = page[root.dataset.source];
    const list = new Utterances(root, source);
    const place = document.querySelector(`.confusions[data-source="${root.dataset.source}"]`);
    if (place) showConfusions(place, source, list);
  }
  document.documentElement.dataset.ready = "true";
})();
