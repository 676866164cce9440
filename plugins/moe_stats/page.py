"""The page with the heat map: one HTML file with its script and style, which loads nothing from elsewhere.

The Content-Security-Policy allows only this script and this style, by their hashes. The script inserts texts with
``textContent`` only, so that a model's name or a server's message can't be interpreted as markup.
"""

from __future__ import annotations

import base64
import hashlib

from .page_script import SCRIPT

STYLE = """
:root{color-scheme:light dark;--cold:#f4f6fb;--hot:#0b3d91;--ink:#111;--line:#8894}
@media (prefers-color-scheme:dark){:root{--cold:#171a21;--hot:#8ab4ff;--ink:#eee}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:90rem;padding:1rem;color:var(--ink)}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.2rem 0 .4rem}
form,.bar{display:flex;flex-wrap:wrap;gap:.6rem;align-items:end;margin:.6rem 0}
label{display:flex;flex-direction:column;font-size:.85rem}
input,button{font:inherit;padding:.3rem .7rem}
:focus-visible{outline:3px solid #e67700;outline-offset:1px}
.scroll{overflow:auto;max-height:70vh;border:1px solid var(--line)}
table{border-collapse:separate;border-spacing:0}
th,td{padding:.15rem .45rem;text-align:right;font-variant-numeric:tabular-nums;border-bottom:1px solid var(--line)}
thead th{position:sticky;top:0;background:Canvas;z-index:1}
th[scope=row]{position:sticky;left:0;background:Canvas}
td.cell{background:color-mix(in oklab,var(--hot) calc(var(--heat,0)*100%),var(--cold));min-width:2.6rem}
td.cell.hot{color:Canvas}
caption{text-align:left;padding:.3rem .45rem;font-size:.9rem}
.error{color:#b00020;font-weight:600}
@media (prefers-color-scheme:dark){.error{color:#ff8a80}}
"""

BODY = """
<h1>Expert distribution</h1>
<p id="summary">Nothing received yet.</p>
<p id="status" role="status"></p>
<form id="connect" autocomplete="off">
<label>Model (empty: the first)<input id="model" name="model"></label>
<label>API key, if the server asks for one<input id="key" name="key" type="password"></label>
<button>Connect</button>
<button type="button" id="pause" aria-pressed="false">Pause</button>
</form>
<div class="bar" role="group" aria-label="Recording">
<button type="button" data-path="/start_expert_distribution_record">Start recording</button>
<button type="button" data-path="/stop_expert_distribution_record">Stop recording</button>
<button type="button" data-path="/dump_expert_distribution_record">Dump to a file</button>
</div>
<h2 id="map-title">Heat map</h2>
<p id="map-help">Darker cells were chosen more often, compared with their layer's busiest expert.
In the table, arrow keys, Home and End move from cell to cell.</p>
<div class="scroll"><table id="map" role="grid" aria-labelledby="map-title" aria-describedby="map-help">
<thead></thead><tbody></tbody></table></div>
<h2 id="layers-title">Layers</h2>
<p>Balance is the mean load of an expert divided by the largest: 1 is even.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="layers-title"><table id="layers">
<thead><tr><th scope="col">Layer</th><th scope="col">Choices</th><th scope="col">Balance</th>
<th scope="col">Busiest experts (share)</th></tr></thead><tbody></tbody></table></div>
<noscript><p>The page needs its script to draw; GET /expert_distribution has the same numbers as JSON.</p></noscript>
"""

PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<title>Expert distribution</title><link rel="icon" href="data:,">'
    f"<style>{STYLE}</style></head><body>{BODY}<script>{SCRIPT}</script></body></html>"
).encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
