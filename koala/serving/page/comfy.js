// The settings in a ComfyUI graph: what its sampler node is connected with.

const SAMPLERS = ["KSampler", "KSamplerAdvanced"];
const READ = [
  ...SAMPLERS, "CLIPTextEncode", "CLIPTextEncodeSDXL", "EmptyLatentImage", "LoraLoader",
  "LoraLoaderModelOnly", "CheckpointLoaderSimple", "VAEDecode", "SaveImage", "PreviewImage",
  "ConditioningZeroOut",
];
const DEEPEST = 50; // connections that are followed

/** The values that the graph's first sampler has; null for a text that is no such graph. */
export function fromComfy(text) {
  let graph;
  try {
    graph = JSON.parse(text);
  } catch {
    return null;
  }
  const nodes = Object.values(graph ?? {}).filter((node) => node?.class_type && node.inputs);
  const sampler = nodes.find((node) => SAMPLERS.includes(node.class_type));
  if (!sampler) return null;
  const { inputs } = sampler;
  const size = follow(graph, inputs.latent_image, (node) => node.inputs.width > 0) ?? {};
  const checkpoint = follow(graph, inputs.model, (node) => node.inputs.ckpt_name);
  return {
    prompt: words(graph, inputs.positive), negative_prompt: words(graph, inputs.negative) ?? "",
    seed: inputs.seed ?? inputs.noise_seed, steps: inputs.steps, guidance: inputs.cfg,
    sampler: [inputs.sampler_name, inputs.scheduler].filter(Boolean).join(" "),
    strength: inputs.denoise < 1 ? inputs.denoise : undefined,
    width: size.inputs?.width, height: size.inputs?.height,
    model: name(checkpoint?.inputs.ckpt_name),
    loras: nodes.filter((node) => node.inputs.lora_name)
      .map(({ inputs: one }) => [name(one.lora_name), one.strength_model ?? 1]),
    others: [...new Set(nodes.map((node) => node.class_type))].filter((kind) => !READ.includes(kind)),
  };
}

/** The text of the first encoder that a conditioning comes from. */
function words(graph, from) {
  const node = follow(graph, from, ({ inputs }) => inputs.text ?? inputs.text_g);
  return node && (node.inputs.text ?? node.inputs.text_g);
}

/** The first node that passes `test`, from a connection [id, output] backwards. */
function follow(graph, from, test) {
  const [coming, seen] = [[from], new Set()];
  while (coming.length && seen.size < DEEPEST) {
    const next = coming.shift();
    const node = Array.isArray(next) ? graph[next[0]] : null;
    if (!node?.inputs || seen.has(node)) continue;
    seen.add(node);
    const found = test(node);
    if (found !== undefined && found !== false && !Array.isArray(found)) return node;
    coming.push(...Object.values(node.inputs));
  }
  return null;
}

/** A file's name without folder and ending. */
const name = (file) =>
  (typeof file === "string" ? file.split(/[\\/]/).pop().replace(/\.\w+$/, "") : undefined);
