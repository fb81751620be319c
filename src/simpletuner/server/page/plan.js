// The plan of a draft: one sentence on what the run will do and need, and the folded details: the memory of each phase.

import { ApiFault, post } from "./api.js";
import { pausing } from "./check.js";
import { button, fill, freshId, h, problemPanel } from "./dom.js";
import { count, duration, engineText, gib } from "./format.js";

const RAM_GIB = [16, 32, 64, 96, 128, 256];
const GPUS = [1, 2, 4, 8];

const PHASES = { text: "Captions", latents: "Images", train: "Training", validation: "Validation" };

/**
 * @param {() => object} draft returns the current draft
 * @param {() => {vram_gib: number|null, ram_gib: number|null}} machine to plan for; null values stand for this machine's
 * @param {(changes: Record<string, any>) => void} apply sets options
 * @param {(steps: number|null) => Record<string, any>|null} longer returns the changes that lengthen a run of too few steps
 */
export function planPanel(draft, machine, apply, longer) {
  const ram = h("select", { id: freshId("ram"), onchange: () => later() },
    h("option", { value: "" }, "Automatic"), RAM_GIB.map((size) => h("option", { value: String(size) }, `${size} GB`)));
  const gpus = h("select", { id: freshId("gpus"), onchange: () => later() },
    h("option", { value: "" }, "As configured"), GPUS.map((each) => h("option", { value: String(each) }, String(each))));
  const sentence = h("div", { class: "stack", "aria-live": "polite" }, h("p", { class: "panel" }, "Not planned yet."));
  const phases = h("div", { class: "stack" });
  const details = h("details", { hidden: true }, h("summary", {}, "Memory of each phase"), h("div", { class: "stack" },
    h("div", { class: "row" }, h("label", { for: ram.id }, "Planned for RAM"), h("span", {}, ram),
      h("label", { for: gpus.id }, "GPUs"), h("span", {}, gpus)), phases));
  const busy = h("span", { class: "hint", hidden: true }, "Planning …");
  const again = button("Plan now", () => { setStale(true); planning.now(); }, { icon: "refresh", kind: "tiny" });
  const node = h("section", { class: "sheet plan stack", "aria-labelledby": "plan-title" },
    h("div", { class: "head" }, h("h2", { id: "plan-title" }, "What will happen"), busy, again),
    sentence,
    details);

  const planning = pausing(1000, async (signal) => {
    const { vram_gib, ram_gib } = machine();
    try {
      const sizes = { vram_gib, ram_gib: ram.value === "" ? ram_gib : Number(ram.value), gpus: gpus.value === "" ? null : Number(gpus.value) };
      show(await post("plan", { ...draft(), ...sizes }, {}, signal));
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      sentence.replaceChildren(problemPanel(error));
      details.hidden = true;
    }
    setStale(false);
  });

  function show({ summary, plan, remedy, workload, time, engine }) {
    const names = [...new Set(plan.phases.flatMap((phase) => phase.parts.map((part) => part.name)))];
    const color = (name) => `var(--part-${(names.indexOf(name) % 8) + 1})`;
    sentence.replaceChildren(h("div", { class: `panel stack ${plan.fits ? "good" : "bad"}` },
      h("p", { class: "sentence" }, summary),
      plan.fits ? "" : h("ul", {}, plan.lacks.map((lack) => h("li", {},
        `${PHASES[lack.phase] ?? lack.phase}: needs ${gib(lack.needed)} of ${memoryName(lack.place)}, has ${gib(lack.there)}.`))),
      remedy ? remedyRow(remedy) : "",
      engine ? h("p", {}, engine.text) : "",
      stepsRow(time?.steps ?? null)));
    details.hidden = false;
    phases.replaceChildren();
    fill(phases,
      time ? timeList(time) : null,
      processesText(plan),
      plan.phases.map((phase) => phaseBars(phase, plan, color)),
      legend(names.filter((name) => plan.phases.some((phase) =>
        phase.parts.some((part) => part.name === name && part.place !== "disk" && part.bytes > 0))), color),
      h("p", { class: "hint" }, workloadText(workload), plan.machine.disk === undefined ? "" : ` Disk: ${gib(plan.peak.disk)} of ${gib(plan.machine.disk)} free.`));
  }

  function remedyRow(remedy) {
    const changes = Object.entries(remedy.changes);
    return h("div", { class: "row" },
      h("p", { class: "grow" }, "It fits with ", changes.map(([name, value], at) => [at ? ", " : "", h("code", {}, `${name} = ${value}`)]),
        `: ${gib(remedy.before)} becomes ${gib(remedy.after)}.`),
      button("Make it fit", () => apply(remedy.changes), { icon: "check", kind: "primary" }));
  }

  function stepsRow(steps) {
    const changes = longer(steps);
    if (changes === null) return "";
    return h("div", { class: "row" },
      h("p", { class: "grow" }, `After ${count(steps)} steps a LoRA has hardly learned anything.`),
      button(`Train ${count(changes.num_train_epochs)} epochs`, () => apply(changes), { kind: "primary" }));
  }

  /** Mark the sentence as outdated: it is about an earlier draft. */
  function setStale(isStale) {
    busy.hidden = !isStale;
    sentence.classList.toggle("stale", isStale);
  }

  function later() {
    setStale(true);
    planning.later();
  }

  /** Show why there is no plan yet. */
  function wait(why) {
    planning.stop();
    setStale(false);
    sentence.replaceChildren(h("p", { class: "panel" }, why));
    details.hidden = true;
  }

  return { node, wait, later, stop: planning.stop };
}
const memoryName = (name) => ({ accelerator: "GPU memory", ram: "RAM", disk: "disk" })[name] ?? name;

function phaseBars(phase, plan, color) {
  const { machine, peak } = plan;
  const bars = ["accelerator", "ram"].filter((memory) => memory !== "accelerator" || machine.accelerator !== null || phase.accelerator > 0);
  return h("div", { class: "phase" },
    h("h3", { title: phase.what }, PHASES[phase.phase] ?? phase.phase),
    bars.map((memory) => {
      const available = machine[memory];
      const used = phase[memory];
      const scale = Math.max(available ?? 0, peak[memory] ?? 0, used, 1);
      const isOver = available !== null && used > available;
      const parts = phase.parts.filter((part) => part.place === memory && part.bytes > 0);
      const words = `${gib(used)}${available === null ? "" : ` of ${gib(available)}`}`;
      return h("div", { class: "phase-bar" },
        h("span", { class: "small dim" }, memory === "ram" ? "RAM" : "GPU"),
        h("div", { class: "meter", role: "img", "aria-label": `${memoryName(memory)}: ${words}. ${parts.map((part) => `${part.name} ${gib(part.bytes)}`).join(", ")}` },
          parts.map((part) => h("span", {
            title: `${part.name}: ${gib(part.bytes)}`, style: { width: `${(part.bytes / scale) * 100}%`, background: color(part.name) },
          })),
          available !== null && available < scale ? h("i", { class: "limit", style: { left: `${(available / scale) * 100}%` } }) : null),
        h("span", { class: `small numbers ${isOver ? "over" : ""}` }, words));
    }));
}

function legend(names, color) {
  return h("ul", { class: "plain legend small" }, names.map((name) => h("li", {}, h("i", { style: { background: color(name) } }), name)));
}

/** Lower bounds for the time of a step and of the run, if the machine's speed is known. */
function timeList({ step_s: step, total_s: total, steps }) {
  const rows = [["Per step, at least", step], ["In total, at least", total]].filter(([, seconds]) => typeof seconds === "number");
  if (rows.length === 0) return h("p", { class: "hint" }, "The time is estimated only if you plan for this machine.");
  return h("dl", { class: "times" },
    rows.map(([title, seconds]) => h("div", {}, h("dt", {}, title), h("dd", { class: "numbers" }, duration(seconds)))),
    typeof steps === "number" ? h("div", {}, h("dt", {}, "Steps"), h("dd", { class: "numbers" }, count(steps))) : null);
}

/** Memory per process and traffic between processes; null for one process. */
function processesText(plan) {
  const { machine, wire } = plan;
  if (!wire) return null;
  const sent = [[wire.gathered, "weights"], [wire.reduced, "gradients"]].filter(([bytes]) => bytes > 0).map(([bytes, name]) => `${gib(bytes)} of ${name}`);
  const times = Object.entries(wire.seconds).map(([link, seconds]) => `${duration(seconds)} over ${link}`);
  return h("p", {}, `${engineText(plan)}: ${machine.accelerator === null ? "" : "GPU memory is per process, "}RAM is for all processes together. `,
    `Each sends ${sent.join(" and ")} per step${machine.accelerator === null ? "" : `; estimated, not measured: ${times.join(", ")}`}.`);
}

function workloadText({ width, height, batch, pictures, captions }) {
  const datasetText = pictures === null || pictures === undefined ? "The images have not been scanned yet." : `${pictures} images, ${captions} captions.`;
  return `Planned for ${width}×${height}, batch size ${batch}. ${datasetText}`;
}
