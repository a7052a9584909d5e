"""The report's style sheet: no fonts, scripts or images from elsewhere; follows the reader's light or dark mode."""

CSS = """
:root { color-scheme: light dark;
  --bg:#fbfbfa; --card:#ffffff; --ink:#1c2230; --soft:#5d6675; --line:#e3e5e8; --faint:#d5dae1; --code:#f3f4f6;
  --c0:#2563c9; --c1:#d8692a; --c2:#1a9070; --c3:#8d4fc7; --c4:#b98a0b; --c5:#c2386b; --c6:#4b92a8; --c7:#7b8494;
  --user:#eef3fb; --assistant:#eef8f3; --tool:#f6f4ee; --good:#147a52; --bad:#b3372f; }
@media (prefers-color-scheme: dark) { :root {
  --bg:#14171c; --card:#1b2027; --ink:#e7eaef; --soft:#9aa4b2; --line:#2d343e; --faint:#3a4350; --code:#232932;
  --c0:#6ea2f5; --c1:#f0935b; --c2:#4cc79f; --c3:#bd8ff0; --c4:#e0b53f; --c5:#ef7ba3; --c6:#7cc3d8; --c7:#97a1b0;
  --user:#1c2636; --assistant:#1b2c26; --tool:#2a2720; --good:#5fd3a2; --bad:#f08a80; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--bg); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; }
main { max-width:1180px; margin:0 auto; padding:28px 24px 60px; }
header h1 { font-size:28px; line-height:1.2; margin:0 0 4px; letter-spacing:-.01em; }
header p { margin:0; color:var(--soft); max-width:110ch; }
h2 { font-size:18px; margin:0 0 2px; } h3 { font-size:15px; margin:18px 0 6px; }
.sub { color:var(--soft); margin:0 0 12px; font-size:13.5px; max-width:130ch; }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:18px 20px; margin-top:18px; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(160px,1fr)); gap:12px; margin-top:20px; }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px 16px; }
.card b { display:block; white-space:nowrap; font-size:24px; line-height:1.25; letter-spacing:-.02em; font-variant-numeric:tabular-nums; }
.card span { color:var(--soft); font-size:13px; }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); gap:18px; }
.two section { min-width:0; } .two section svg { max-width:620px; }
svg { display:block; width:100%; height:auto; overflow:visible; }
svg text { fill:var(--ink); font-size:12.5px; font-variant-numeric:tabular-nums; }
svg .note, svg .axis { fill:var(--soft); font-size:11.5px; } svg .strong { font-weight:650; }
svg .grid { stroke:var(--line); stroke-width:1; } svg .bar { opacity:.88; }
svg .whisker { stroke:var(--ink); stroke-width:1.5; fill:none; } svg .faint { fill:var(--faint); }
svg .curve { fill:none; stroke-width:2.2; stroke-linejoin:round; } svg .raw { fill:none; stroke-width:1; opacity:.3; }
.legend { display:flex; flex-wrap:wrap; gap:4px 16px; margin-top:8px; font-size:13px; color:var(--soft); }
.legend i { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:6px; vertical-align:-1px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:13.5px; font-variant-numeric:tabular-nums; }
th, td { text-align:right; padding:5px 9px; border-bottom:1px solid var(--line); white-space:nowrap; }
th { color:var(--soft); font-weight:550; white-space:normal; vertical-align:bottom; line-height:1.3; } th:first-child, td:first-child { text-align:left; }
tr.strong td { font-weight:650; } td.text, th.text { text-align:left; white-space:normal; }
td.shade { background:color-mix(in srgb, var(--c2) calc(var(--share)*55%), transparent); }
.good { color:var(--good); } .bad { color:var(--bad); } .quiet { color:var(--soft); }
details { border:1px solid var(--line); border-radius:8px; margin-top:8px; }
summary { cursor:pointer; padding:8px 12px; font-size:14px; } summary code { font-size:12.5px; }
details[open] summary { border-bottom:1px solid var(--line); }
.turns { padding:10px 12px 14px; }
.turn { border-radius:8px; padding:7px 12px 9px; margin-top:8px; } .turn.user { background:var(--user); }
.turn.assistant { background:var(--assistant); margin-left:34px; } .turn.tool { background:var(--tool); }
.turn.system { background:var(--code); }
.turn b { font-size:11.5px; color:var(--soft); text-transform:uppercase; letter-spacing:.05em; font-weight:600; }
pre { margin:2px 0 0; white-space:pre-wrap; overflow-wrap:anywhere;
  font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace; }
pre .tag { color:var(--c3); } pre .token { color:var(--soft); user-select:none; }
code { font:12.5px ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace; background:var(--code);
  padding:1px 5px; border-radius:4px; }
footer { color:var(--soft); font-size:13px; margin-top:22px; }
"""
