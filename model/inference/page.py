"""The page at `/`: completes a text and colours each token by the recursions that it executed. One file, no network."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mixture-of-Recursions</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
textarea { box-sizing: border-box; width: 100%; font: inherit; padding: .5rem; }
label { margin-right: 1rem; } input[type=number] { width: 5rem; font: inherit; } button { font: inherit; }
#answer { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: .75rem; min-height: 4rem; }
#answer span, #legend span { border-radius: 3px; } #answer .prompt { text-decoration: underline #888 1px; }
#legend span { padding: 0 .5rem; margin-right: .25rem; } #error { color: #a00; }
</style>
<h1>Mixture-of-Recursions</h1>
<p id="model"></p>
<form id="form">
<p><textarea id="prompt" rows="4" aria-label="prompt" autofocus>The state of the</textarea></p>
<p><label>tokens <input id="tokens" type="number" min="1" value="48"></label>
<label>temperature <input id="temperature" type="number" min="0" max="2" step="0.1" value="0"></label>
<label>depth <input id="depth" size="12" value="adaptive" title="adaptive, cap:N, uniform:N or progressive:A-B"></label>
<label>key <input id="key" type="password" autocomplete="off" size="8"></label>
<button>Complete</button></p>
</form>
<p id="legend"></p>
<div id="answer" aria-live="polite"></div>
<p id="error" role="alert"></p>
<script>
const $ = id => document.getElementById(id);
const colours = ["#e8e8e8", "#cfe3ff", "#c8efe0", "#fff0b3", "#ffd3a8", "#ffb3b3", "#e5b8ff"];
const colour = depth => depth === undefined ? "transparent" : colours[Math.min(depth, colours.length - 1)];
const headers = () => {
  const all = {"Content-Type": "application/json"};
  if ($("key").value) all.Authorization = "Bearer " + $("key").value;
  return all;
};
function add(text, depth, scores, prompt) {
  const span = document.createElement("span");
  span.textContent = text;
  span.style.background = colour(depth);
  const listed = (scores || []).map(score => score === null ? "–" : score.toFixed(3)).join(", ");
  if (depth !== undefined) span.title = depth + (depth === 1 ? " recursion" : " recursions") + ", scores " + listed;
  if (prompt) span.className = "prompt";
  $("answer").append(span);
}
$("form").addEventListener("submit", async event => {
  event.preventDefault();
  $("answer").replaceChildren(); $("legend").replaceChildren(); $("error").textContent = "";
  const asked = {prompt: $("prompt").value, max_tokens: +$("tokens").value, temperature: +$("temperature").value,
    depth: $("depth").value.trim() || null, echo: true, logprobs: 0, return_depth: true, return_scores: true,
    return_flops: true};
  try {
    const got = await fetch("v1/completions", {method: "POST", headers: headers(), body: JSON.stringify(asked)});
    const body = await got.json();
    if (!got.ok) throw new Error(body.error.message);
    const choice = body.choices[0], offsets = [...choice.logprobs.text_offset, choice.text.length];
    const depths = [...choice.mor.prompt_depths, ...choice.mor.depths], prompt = body.usage.prompt_tokens;
    const scores = [...choice.mor.prompt_scores, ...choice.mor.scores];
    choice.logprobs.tokens.forEach((_, i) =>
      add(choice.text.slice(offsets[i], offsets[i + 1]), depths[i], scores[i], i < prompt));
    const seen = [...new Set(depths)].sort((a, b) => a - b);
    $("legend").append("recursions: ", ...seen.map(depth => {
      const span = document.createElement("span");
      span.textContent = depth; span.style.background = colour(depth);
      return span;
    }), "(prompt underlined) ",
      (100 * choice.mor.flops / choice.mor.full_depth_flops).toFixed(0) + "% of the FLOPs of full depth");
    $("model").textContent = body.model;
  } catch (error) { $("error").textContent = error.message; }
});
</script>
</html>
"""
