// The memory plan at a glance: what each phase takes, against what the machine has.

import { ApiFault, post } from "./api.js";
import { pausing } from "./check.js";
import { button, freshId, h, problemPanel } from "./dom.js";
import { count, duration, gib } from "./format.js";

/** Cards that people have, with the memory of the machine around them, in GiB. */
const MACHINES = [[8, 32], [12, 32], [16, 32], [24, 64], [48, 128], [80, 256]];

const PHASES = { text: "Captions", latents: "Pictures", train: "Training", validation: "Validation" };

/**
 * @param {() => object} draft what is planned, now
 * @param {(changes: Record<string, any>) => void} apply sets options
 */
export function planPanel(draft, apply) {
  const choose = h("select", { id: freshId("machine"), onchange: () => ask.now() },
    h("option", { value: "" }, "This machine"),
    MACHINES.map(([vram, ram]) => h("option", { value: `${vram},${ram}` }, `${vram} GB card, ${ram} GB RAM`)),
    h("option", { value: "0,32" }, "No card, 32 GB RAM"));
  const result = h("div", { class: "stack", "aria-live": "polite" }, h("p", { class: "dim" }, "Not planned yet."));
  const busy = h("span", { class: "hint", hidden: true }, "Planning …");
  const again = button("Plan now", () => ask.now(), { icon: "refresh", kind: "tiny" });
  const node = h("section", { class: "sheet plan stack", "aria-labelledby": "plan-title" },
    h("div", { class: "head" }, h("h2", { id: "plan-title" }, "Plan"), busy, again),
    h("div", { class: "stack" }, h("label", { for: choose.id }, "Machine"), choose),
    result);

  const ask = pausing(1500, async (signal) => {
    const [vram, ram] = choose.value === "" ? [null, null] : choose.value.split(",").map(Number);
    busy.hidden = false;
    try {
      show(await post("plan", { ...draft(), vram_gib: vram, ram_gib: ram }, {}, signal));
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      result.replaceChildren(problemPanel(error));
    }
    busy.hidden = true;
  });

  function show(answer) {
    const { plan, remedy, workload } = answer;
    const names = [...new Set(plan.phases.flatMap((phase) => phase.parts.map((part) => part.name)))];
    const colour = (name) => `var(--part-${(names.indexOf(name) % 8) + 1})`;
    result.replaceChildren(
      verdict(plan),
      ...(remedy ? [remedyPanel(remedy)] : []),
      ...(answer.time ? [timeList(answer.time)] : []),
      ...plan.phases.map((phase) => phaseBars(phase, plan, colour)),
      legend(names.filter((name) => plan.phases.some((phase) =>
        phase.parts.some((part) => part.name === name && part.place !== "disk" && part.bytes > 0))), colour),
      h("p", { class: "hint" }, workloadText(workload), plan.machine.disk === undefined ? "" : ` Disk: ${gib(plan.peak.disk)} of ${gib(plan.machine.disk)} free.`));
  }

  function remedyPanel(remedy) {
    const changes = Object.entries(remedy.changes);
    return h("div", { class: "panel stack" },
      h("p", {}, h("strong", {}, "What would fit: "), changes.map(([name, value], at) => [at ? ", " : "", h("code", {}, `${name} = ${value}`)]),
        `. ${gib(remedy.before)} becomes ${gib(remedy.after)}.`),
      h("div", {}, button("Apply", () => apply(remedy.changes), { icon: "check" })));
  }

  return { node, later: ask.later, now: ask.now, stop: ask.stop };
}

function verdict(plan) {
  if (plan.fits) return h("p", { class: "panel good" }, "It fits.");
  return h("div", { class: "panel bad" }, h("ul", {}, plan.lacks.map((lack) => h("li", {},
    `${PHASES[lack.phase] ?? lack.phase}: ${gib(lack.needed)} of ${place(lack.place)} needed, ${gib(lack.there)} there.`))));
}

const place = (name) => ({ accelerator: "GPU memory", ram: "RAM", disk: "disk" })[name] ?? name;

function phaseBars(phase, plan, colour) {
  const { machine, peak } = plan;
  const bars = ["accelerator", "ram"].filter((where) => where !== "accelerator" || machine.accelerator !== null || phase.accelerator > 0);
  return h("div", { class: "phase" },
    h("h3", { title: phase.what }, PHASES[phase.phase] ?? phase.phase),
    bars.map((where) => {
      const there = machine[where];
      const used = phase[where];
      const whole = Math.max(there ?? 0, peak[where] ?? 0, used, 1);
      const over = there !== null && used > there;
      const parts = phase.parts.filter((part) => part.place === where && part.bytes > 0);
      const words = `${gib(used)}${there === null ? "" : ` of ${gib(there)}`}`;
      return h("div", { class: "phase-bar" },
        h("span", { class: "small dim" }, where === "ram" ? "RAM" : "GPU"),
        h("div", { class: "meter", role: "img", "aria-label": `${place(where)}: ${words}. ${parts.map((part) => `${part.name} ${gib(part.bytes)}`).join(", ")}` },
          parts.map((part) => h("span", {
            title: `${part.name}: ${gib(part.bytes)}`, style: { width: `${(part.bytes / whole) * 100}%`, background: colour(part.name) },
          })),
          there !== null && there < whole ? h("i", { class: "limit", style: { left: `${(there / whole) * 100}%` } }) : null),
        h("span", { class: `small numbers ${over ? "over" : ""}` }, words));
    }));
}

function legend(names, colour) {
  return h("ul", { class: "plain legend small" }, names.map((name) => h("li", {}, h("i", { style: { background: colour(name) } }), name)));
}

/** The least time of a step and of the whole, where the machine's speed is known. */
function timeList({ step_s: step, total_s: total, steps }) {
  const rows = [["A step, at least", step], ["In all, at least", total]].filter(([, seconds]) => typeof seconds === "number");
  if (rows.length === 0) return h("p", { class: "hint" }, "How long it takes is known only for this machine.");
  return h("dl", { class: "times" },
    rows.map(([title, seconds]) => h("div", {}, h("dt", {}, title), h("dd", { class: "numbers" }, duration(seconds)))),
    typeof steps === "number" ? h("div", {}, h("dt", {}, "Steps"), h("dd", { class: "numbers" }, count(steps))) : null);
}

function workloadText({ width, height, batch, pictures, captions }) {
  const seen = pictures === null || pictures === undefined ? "The pictures were not scanned yet." : `${pictures} pictures, ${captions} captions.`;
  return `Planned for ${width}×${height}, ${batch} at a time. ${seen}`;
}
