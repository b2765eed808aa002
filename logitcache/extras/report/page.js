// Draws the charts in the page's colours and redraws them when the theme changes; highlights one student, or one path in a tree.
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  let highlighted = "";

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const font = style.getPropertyValue("--font").trim();
    const series = [1, 2, 3, 4, 5, 6].map((number) => colour(`series-${number}`));
    const text = { labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      background: "transparent",
      font,
      padding: 4,
      view: { stroke: null },
      axis: {
        ...text, labelColor: colour("muted"), titleColor: colour("muted"), gridColor: colour("grid"),
        domainColor: colour("line"), tickColor: colour("line"), titlePadding: 8,
      },
      axisX: { grid: false, labelFlush: false, labelOverlap: true },
      legend: { ...text, labelColor: colour("ink"), titleColor: colour("muted"), titleLimit: 240, labelLimit: 240 },
      range: {
        category: series,
        symbol: ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"],
        heatmap: [colour("heat-low"), colour("heat-middle"), colour("heat-high")],
      },
      style: {
        quantity: { color: series[0] },
        reference: { color: colour("ink"), strokeDash: [4, 4], strokeWidth: 1.5 },
        "reference-label": { color: colour("ink"), align: "left", baseline: "bottom", dy: -3, fontSize: 12 },
        mean: { color: colour("surface"), stroke: colour("ink"), filled: true, strokeWidth: 1.5, size: 44, opacity: 1 },
        extreme: { color: series[1], shape: "triangle-up", strokeWidth: 1.5, size: 44, opacity: 1 },
        spread: { color: colour("ink"), strokeWidth: 1.5 },
        cell: { stroke: colour("surface"), strokeWidth: 1 },
        diagonal: { color: colour("quiet"), stroke: colour("surface"), strokeWidth: 1 },
        inside: { color: colour("muted"), fontSize: 11 },
        student: { filled: true, size: 110, stroke: colour("surface"), strokeWidth: 1 },
        band: { strokeWidth: 0 },
        curve: { strokeWidth: 2 },
        "curve-point": { filled: true, size: 18 },
      },
    };
  }

  async function draw(id) {
    const place = document.getElementById(id);
    const options = {
      mode: "vega-lite", renderer: "svg", actions: false, config: theme(),
      ast: true, // interpret expressions: the page does not allow 'unsafe-eval'
      tooltip: { theme: dark.matches ? "dark" : "light" },
    };
    views.get(id)?.finalize();
    const result = await vegaEmbed(place, structuredClone(specs[id]), options);
    views.set(id, result);
    if (highlighted) await highlight(result.view);
  }

  async function highlight(view) {
    if ("student" in (view.getState().signals ?? {})) await view.signal("student", highlighted).runAsync();
  }

  async function drawAll() {
    document.documentElement.dataset.drawn = "no";
    for (const id of Object.keys(specs)) {
      try {
        await draw(id);
      } catch (error) { // draw the others
        document.getElementById(id).textContent = "This chart could not be drawn. Its numbers are in the table below.";
        console.error(error);
      }
    }
    document.documentElement.dataset.drawn = "yes";
  }

  for (const button of document.querySelectorAll("[data-student]")) {
    button.addEventListener("click", () => {
      highlighted = highlighted === button.dataset.student ? "" : button.dataset.student;
      for (const other of document.querySelectorAll("[data-student]")) {
        other.setAttribute("aria-pressed", String(highlighted !== "" && other.dataset.student === highlighted));
      }
      for (const { view } of views.values()) highlight(view);
    });
  }

  for (const place of document.querySelectorAll(".drawing")) { // show the root where the tree is wider than the page
    place.scrollLeft = (place.scrollWidth - place.clientWidth) / 2;
  }

  for (const button of document.querySelectorAll("[data-path]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const other of document.querySelectorAll(`[data-tree="${button.dataset.tree}"]`)) {
        other.setAttribute("aria-pressed", String(on && other === button));
      }
      const path = new Set(on ? button.dataset.path.split(" ") : []);
      for (const part of document.getElementById(button.dataset.tree).querySelectorAll("[data-node]")) {
        part.classList.toggle("on", path.has(part.dataset.node));
      }
    });
  }

  let drawing = drawAll();
  dark.addEventListener("change", () => { drawing = drawing.then(drawAll); });
})();
