// The atlas: filters, the table and what a cell tells, from the data in the page. What is chosen is kept in the address.
(() => {
  "use strict";
  const root = document.getElementById("atlas");
  const { cards, rows } = JSON.parse(document.getElementById("atlas-data").textContent);
  // What `answers` holds of a card, in this order.
  const [STATE, SPARE, SECONDS, POLICY, AWAY, PEAK] = [0, 1, 2, 3, 4, 5];
  const CLASS = { yes: "yes", "within the guesses": "guesses", no: "no" };
  const ANY = "any";

  const size = (row) => [...(row.frames > 1 ? [row.frames] : []), row.height, row.width].join(" x ");
  const count = (row) => (row.count > 1 ? `${row.count} cards, FSDP` : "1 card");
  const filters = {
    model: { label: "Model", of: (row) => row.model },
    size: { label: "Size", of: size },
    trained: { label: "Trained", of: (row) => row.trained },
    count: { label: "How many cards", of: count },
  };
  const shown = { all: "all", yes: "what fits", guesses: "what fits, and what may" };

  // Elements.

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  const form = make("form");
  const selects = {};
  function select(name, label) {
    selects[name] = make("select", { name, id: `atlas-${name}` });
    form.append(make("div", {}, make("label", { for: `atlas-${name}` }, label), selects[name]));
  }
  function offer(name, options) {
    const before = selects[name].value || ANY;
    selects[name].replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
    selects[name].value = options.some(([value]) => value === before) ? before : options[0][0];
  }
  for (const [name, filter] of Object.entries(filters)) select(name, filter.label);
  select("card", "Card");
  select("fits", "Show");
  offer("card", [[ANY, ANY], ...cards.map((card) => [card.name, `${card.size}: ${card.label}`])]);
  offer("fits", Object.entries(shown));

  const tally = make("p", { class: "tally" });
  const head = make("thead");
  const body = make("tbody");
  const told = make("div", { role: "status" });
  const made = new Set(rows.map(({ environment: at }) => `dancegrpo_fast ${at.dancegrpo_fast}, revision ${at.git}, ${at.date.slice(0, 10)}`));
  root.append(make("p", {}, `Predicted by ${[...made].join("; ")}.`), form, tally, make("div", { class: "scroll" }, make("table", { class: "cards" }, head, body)), told);

  // Words.

  function duration(seconds) {
    if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
    if (seconds < 600) return `${Math.round(seconds)} s`;
    return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }
  const gib = (number) => `${number.toFixed(1)} GiB`;
  function brief(answer) {
    if (answer[STATE] === "no") return `-${(-answer[SPARE]).toFixed(answer[SPARE] < -9.95 ? 0 : 1)} GiB`;
    return duration(answer[SECONDS]) + (answer[STATE] === "yes" ? "" : " ?");
  }
  function sentence(answer) {
    if (answer[STATE] === "yes") return `Fits with ${gib(answer[SPARE])} to spare.`;
    if (answer[STATE] === "no") return `Does not fit: ${gib(-answer[SPARE])} are missing.`;
    return `Within the guesses: the tensors fit, and ${gib(-answer[SPARE])} of the margins do not.`;
  }

  function tell(row, card) {
    const answer = row.answers[card.name];
    const [words, options] = row.away[answer[AWAY]];
    const where = `${row.count > 1 ? `${row.count} x ` : ""}${card.size} (${card.label}: ${card.gib.toFixed(2)} GiB as torch sees it)`;
    const speed = answer[STATE] === "no" ? "" : ` An iteration takes ${duration(answer[SECONDS])}, as predicted.`;
    const kept = `Checkpointing: ${answer[POLICY]}. ${words ? `To make room ${words}. ` : ""}Most memory is taken in: ${answer[PEAK]}.`;
    told.replaceChildren(
      make("p", {}, make("strong", {}, `${row.model}, ${size(row)}, ${row.trained}, on ${where}`)),
      make("p", { class: CLASS[answer[STATE]] }, sentence(answer) + speed),
      make("p", {}, kept),
      make("code", {}, [row.command, options, `--card ${card.name}`].filter(Boolean).join(" ")),
    );
  }

  // The table.

  function fits(answer, wanted) {
    return wanted === "all" || answer[STATE] === "yes" || (wanted === "guesses" && answer[STATE] !== "no");
  }

  function draw() {
    const chosen = Object.fromEntries(Object.entries(selects).map(([name, element]) => [name, element.value]));
    const columns = cards.filter((card) => [ANY, card.name].includes(chosen.card));
    const found = rows.filter(
      (row) =>
        Object.entries(filters).every(([name, filter]) => [ANY, filter.of(row)].includes(chosen[name])) &&
        (chosen.fits === "all" || columns.some((card) => row.answers && fits(row.answers[card.name], chosen.fits))),
    );
    tally.textContent = `${found.length} of ${rows.length} settings`;
    const titles = columns.map((card) => make("th", { scope: "col" }, card.size, make("small", {}, card.label)));
    head.replaceChildren(make("tr", {}, make("th", { scope: "col" }, "Setting"), ...titles));
    body.replaceChildren(...found.map((row) => line(row, columns, chosen.fits)));
    told.replaceChildren(make("p", {}, found.length ? "Choose a cell." : "No setting is like this."));
    const kept = Object.entries(chosen).filter(([name, value]) => value !== (name === "fits" ? "all" : ANY));
    const hash = new URLSearchParams(kept).toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  function line(row, columns, wanted) {
    const parts = [size(row), row.trained, count(row)].map((text, i) => make("span", {}, i < 2 ? `${text}, ` : text));
    const title = make("th", { scope: "row" }, `${row.model} `, ...parts);
    if (!row.answers) return make("tr", {}, title, make("td", { colspan: columns.length }, row.refused));
    const cells = columns.map((card) => {
      const answer = row.answers[card.name];
      if (!fits(answer, wanted)) return make("td");
      const label = `${card.size}: ${sentence(answer)}`;
      const button = make("button", { type: "button", "aria-label": `${brief(answer)}, ${label}`, "aria-pressed": "false" }, brief(answer));
      button.addEventListener("click", () => {
        for (const other of body.querySelectorAll('[aria-pressed="true"]')) other.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", "true");
        tell(row, card);
      });
      return make("td", { class: CLASS[answer[STATE]] }, button);
    });
    return make("tr", {}, title, ...cells);
  }

  // What can be chosen: of a size only those of the model, and so on.

  function offers() {
    let left = rows;
    for (const [name, filter] of Object.entries(filters)) {
      offer(name, [[ANY, ANY], ...[...new Set(left.map(filter.of))].map((value) => [value, value])]);
      left = left.filter((row) => [ANY, filter.of(row)].includes(selects[name].value));
    }
  }

  function fromAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const [name, element] of Object.entries(selects)) {
      offers();
      const value = given.get(name) || (name === "fits" ? "all" : ANY);
      element.value = [...element.options].some((option) => option.value === value) ? value : element.options[0].value;
    }
    offers();
    draw();
  }

  form.addEventListener("change", () => {
    offers();
    draw();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
})();
