"use strict";
(async () => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const options = { actions: false, renderer: "svg", tooltip: { theme: "custom" } };
  const views = new Map();
  for (const [name, spec] of Object.entries(specs)) {
    const { view } = await vegaEmbed(document.getElementById(name), spec, options);
    views.set(name, view);
  }
  for (const select of document.querySelectorAll("select[data-section]")) {
    const choose = () => {
      for (const chart of document.getElementById(select.dataset.section).querySelectorAll(".chart")) {
        const view = views.get(chart.id);
        if ("choice" in view.getState().signals) view.signal("choice", Number(select.value)).runAsync();
      }
    };
    select.addEventListener("change", choose);
    // A browser that goes back to the page keeps what was chosen.
    choose();
  }
  document.documentElement.dataset.drawn = String(views.size);
})();
