"""The HTML of report.html, a jinja2 template; write.py fills it, with autoescape on."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} - SocraticPO run</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .quiet { color: #5b6675 }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0 }
.tile { border: 1px solid #d5dbe3; border-radius: 8px; padding: .8rem 1.2rem; min-width: 13rem }
.tile b { display: block; font-size: 1.9rem; color: #1f5fa8 } .tile.side b { color: #5b6675 }
img { width: 100%; border: 1px solid #d5dbe3; border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e6eaef; vertical-align: top }
td.num { text-align: right; font-variant-numeric: tabular-nums } code { font-size: .9em }
.bar { display: inline-block; height: .8rem; background: #1f5fa8; border-radius: 2px }
details { border: 1px solid #d5dbe3; border-radius: 8px; padding: .6rem 1rem; margin: .8rem 0 }
summary { cursor: pointer; font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; margin: .3rem 0 1rem;
 padding: .6rem .8rem; border-left: 4px solid #b9c2cd; background: #f6f8fa; font-size: .85rem }
pre.right { border-color: #2e8b57 } pre.wrong { border-color: #c0392b } pre.teacher { border-color: #d9730d }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p class="quiet">SocraticPO: {{ num_updates }} updates over {{ num_batches }} batches.</p>

{% if headline.end is not none %}
<div class="tiles">
 <div class="tile">unassisted at the start<b>{{ headline.start | percent }}</b></div>
 <div class="tile">unassisted at the end<b>{{ headline.end | percent }}</b></div>
 {% if headline.helped_end is not none %}
 <div class="tile side">assisted at the end<b>{{ headline.helped_end | percent }}</b></div>
 {% endif %}
</div>
<p>Measured on {{ headline.source }}. <b>Unassisted</b> accuracy, the share of questions that the student gets right
alone and at the first attempt, is what training is for. Assisted accuracy also counts answers that became right after
help; it is shown apart, because a student that leans on help has not learned.</p>
{% if accuracy %}
<table>
<tr><th>last evaluation</th><th>share</th><th>95 % interval, by question</th></tr>
{% for row in accuracy %}
<tr><td>{{ row.what }}</td><td class="num">{{ row.share | percent }}</td>
<td class="num">{{ row.low | percent }} to {{ row.high | percent }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% else %}
<p>No accuracy has been recorded yet: the run stopped before its first batch or evaluation ended.</p>
{% endif %}

{% if comparison %}
<h2>What the teacher bought</h2>
<img src="{{ comparison | inline }}"
 alt="Unassisted accuracy over sampled tokens: this run, and recorded ones without a teacher">
<p>The same student beside recorded trainings of it without a tutor, at equal sampled tokens: one answer and no teacher
(K = 1), and a second answer after a fixed sentence that says nothing about the mistake. Lines are means of several
runs, shades their least and greatest. The student is almost never right alone on what it holds wrong, so without help
there is little to reward. The tutor's word makes some of its second answers right, these are rewarded, and what it
learns there it soon knows without the word: assisted accuracy rises first and unassisted accuracy follows. Where a
student finds right answers by itself, expect no such gain.</p>
{% endif %}

<h2>What happened here</h2>
<p>The student answers a question several times over. A wrong answer goes to a teacher, who sends back a short message
about what went wrong, and the student tries again with that message in view. An answer that is right at once earns a
reward of 1. One that is right only after help earns less: its reward is multiplied by <i>decay f_1</i>, by default the
average reward of the first attempts. While the student is weak, help is worth little, so asking for it never becomes an
easy way to reward. Each attempt is then compared with the others at the same question; attempts better than their
average are made more likely, worse ones less.</p>

{% if curves %}
<h2>Curves</h2>
<img src="{{ curves | inline }}"
 alt="Accuracy, reward, guidance, entropy, gradient norm and time over updates">
<ul>
<li><b>Accuracy</b> should rise. Typically assisted accuracy rises first and the unassisted one follows.</li>
<li><b>Reward and decay</b>: f_1 grows with the student, as its first attempts get better.</li>
<li><b>Guidance</b>: fewer rollouts need it as the student improves; <i>rescued</i> says how often it works;
<i>answer leaked</i> how often the teacher gave the answer away, which teaches copying and should stay near zero.</li>
<li><b>Entropy</b> is how undecided the student is about the next token. A slow fall is normal; a crash to zero means
that it always says the same.</li>
<li><b>Gradient norm</b>: spikes point at unstable updates; a smaller learning rate helps.</li>
<li><b>Time</b>: where the seconds of a batch go.</li>
</ul>
{% endif %}

{% if times.values() | sum > 0 %}
<h2>Time</h2>
<table>
{% for phase, seconds in times.items() %}
<tr><td>{{ phase }}</td><td class="num">{{ seconds | number }} s</td>
<td><span class="bar" style="width: {{ (400 * seconds / (times.values() | sum)) | round }}px"></span></td></tr>
{% endfor %}
</table>
{% endif %}

{% if samples %}
<h2>Rollouts</h2>
<p>From the first, a middle and the last batch, one of each outcome. Green: graded right. Red: graded wrong. Orange: the
teacher's words. The reward is after decay; a positive advantage made the attempt more likely, a negative one less.</p>
{% for rollout in samples %}
<details{% if loop.first %} open{% endif %}>
<summary>Batch {{ rollout.batch }}, question {{ rollout.question_idx }}: {{ rollout.outcome }}</summary>
<p class="quiet">Ended because: {{ rollout.end_reason }}. Data: {{ rollout.data_source }}. Weights: version
{{ rollout.policy_version }}.</p>
Question<pre>{{ rollout.question }}</pre>
Right answer<pre>{{ rollout.ground_truth }}</pre>
{% for turn in rollout.turns %}
Attempt {{ loop.index }}: {{ "right" if turn.is_correct else "wrong" }}, reward {{ turn.reward | number }},
advantage {{ turn.advantage | number }}, {{ turn.num_tokens }} tokens
{%- if turn.finish_reason == "length" %}, stopped by the length limit{% endif %}
{%- if turn.guidance and turn.guidance.was_shown %}
{%- set seen = [turn.guidance.kept_tokens - turn.context_tokens, 0] | max %}
{%- if seen < turn.num_tokens %}, of which the next attempt saw {{ seen }} as sampled{% endif %}
{%- endif %}
<pre class="{{ "right" if turn.is_correct else "wrong" }}">{{ turn.text }}</pre>
{% if turn.guidance %}
Teacher{% if not turn.guidance.was_shown %} (the student did not see it){% endif %}
<pre class="teacher">{{ turn.guidance.text }}</pre>
{% endif %}
{% endfor %}
</details>
{% endfor %}
{% endif %}

{% if changes %}
<h2>All metrics</h2>
<table>
<tr><th>metric</th><th>of</th><th>first</th><th>last</th><th>meaning</th></tr>
{% for change in changes %}
<tr><td><code>{{ change.name }}</code></td><td>{{ change.kind }}</td><td class="num">{{ change.first | number }}</td>
<td class="num">{{ change.last | number }}</td><td>{{ change.meaning }}</td></tr>
{% endfor %}
</table>
{% endif %}

{% if config %}
<h2>Settings</h2>
<table>
{% for section, table in config.items() %}
{% for key, value in table.items() %}
<tr><td><code>{{ section }}.{{ key }}</code></td><td>{{ value | text }}</td></tr>
{% endfor %}
{% endfor %}
</table>
{% endif %}
</body>
</html>
"""
