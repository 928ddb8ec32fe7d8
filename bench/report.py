"""What bench/run makes of its samples: medians and ratios, the table, the plot."""
import math
import statistics
from html import escape

SIDES = ("native", "doppel", "qemu")
SPEEDUP_OF_NATIVE = 0.95


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def summarize(row):
    """Adds to a row with samples (seconds by machine): medians, spread, ratios, verdict."""
    row["median"] = {side: statistics.median(times) for side, times in row["seconds"].items() if times}
    row["range"] = {side: [min(times), max(times)] for side, times in row["seconds"].items() if times}
    median = row["median"]
    row["ratio"] = {f"{a}/{b}": median[a] / median[b] for a, b in (("doppel", "native"), ("qemu", "native"), ("doppel", "qemu"))
                    if a in median and b in median and median[b] > 0}
    return judge(row)


def judge(row):
    row["passed"] = None
    if row.get("goal"):
        kind, limit = row["goal"]
        value = row["value"] if kind in ("value", "speedup") else row["ratio"].get("doppel/" + kind)
        native = row.get("speedup", {}).get("native")
        if kind == "speedup" and native:  # where the host's own processors hold each other up, no guest's can do better
            limit = min(limit, SPEEDUP_OF_NATIVE * native)
        if value is not None:
            row["passed"] = value >= limit if kind == "speedup" else value <= limit
    return row


def mean_row(name, rows, goal):
    """Geometric means of the ratios of rows that have all of them."""
    ratios = {key: geometric_mean([row["ratio"][key] for row in rows if key in row["ratio"]]) for key in
              ("doppel/native", "qemu/native", "doppel/qemu")}
    return judge({"name": name, "ratio": {key: value for key, value in ratios.items() if value}, "goal": goal})


def number(value):
    if value is None:
        return ""
    if isinstance(value, int):
        return "%d" % value
    return "%.0f" % value if value >= 99.95 else "%.1f" % value if value >= 9.995 else "%.2f" % value


def spread(values):
    """The median and, of several, the extremes."""
    if not values:
        return ""
    text = number(statistics.median(values))
    return text if len(values) == 1 else "%s (%s..%s)" % (text, number(min(values)), number(max(values)))


def verdict(row):
    if not row.get("goal"):
        return ""
    kind, limit = row["goal"]
    sign = ">=" if kind == "speedup" else "<="
    what = {"native": " native", "qemu": " qemu", "speedup": " or %d %% of native's" % (100 * SPEEDUP_OF_NATIVE)}.get(kind, "")
    word = {True: "pass", False: "FAIL", None: "-"}[row["passed"]]
    return "%s %s%s" % (sign, "%g" % limit, what), word


def print_table(title, rows, unit, scale):
    """`scale`: row -> what to multiply seconds by."""
    print("\n%-16s" % title + "%9s %21s %24s" % ("native", "doppel", "qemu") + "%9s%9s%9s   %-12s" % ("dop/nat", "qemu/nat", "dop/qemu", "goal"))
    print("%-16s" % ("(%s)" % unit) + "%9s %21s %24s" % ("median", "median (min..max)", "median (min..max)"))
    for row in rows:
        cells = []
        for side, width in zip(SIDES, (9, 21, 24)):
            text = ""
            if side in row.get("median", {}):
                by = scale(row)
                text = number(row["median"][side] * by)
                if side != "native":
                    text += " (%s..%s)" % tuple(number(value * by) for value in row["range"][side])
            cells.append(text.rjust(width))
        ratios = ["%9s" % number(row["ratio"].get(key)) for key in ("doppel/native", "qemu/native", "doppel/qemu")]
        goal, word = verdict(row) or ("", "")
        print("%-16s" % row["name"] + " ".join(cells) + "".join(ratios) + "   %-12s %s" % (goal, word))


def print_means(rows):
    print("\n%-46s%9s%9s%9s   %s" % ("", "dop/nat", "qemu/nat", "dop/qemu", "goal"))
    for row in rows:
        ratios = ["%9s" % number(row["ratio"].get(key)) for key in ("doppel/native", "qemu/native", "doppel/qemu")]
        goal, word = verdict(row) or ("", "")
        print("%-46s" % row["name"] + "".join(ratios) + "   %-12s %s" % (goal, word))


STYLE = """
  svg { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --rule: #d1d9e0; --paper: #ffffff; --a: #0a5fc2; --b: #b35900; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6edf3; --soft: #9198a1; --rule: #3d444d; --paper: #0d1117; --a: #58a6ff; --b: #f0a040; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--ink); }
  .soft { fill: var(--soft); font-size: 11px; }
  .head { font-weight: 600; }
  .rule { stroke: var(--rule); }
  .one { stroke: var(--soft); stroke-dasharray: 3 3; }
  .goal { stroke: var(--ink); stroke-width: 2; }
  .a { fill: var(--a); stroke: none; }
  .b { fill: none; stroke: var(--b); stroke-width: 2; }
"""


def plot(groups, title, note):
    """An SVG: a line a workload, time over native on a logarithmic axis; what has no native time is left out."""
    groups = [(head, [row for row in rows if row["ratio"].get("doppel/native") or row["ratio"].get("qemu/native")]) for head, rows in groups]
    groups = [(head, rows) for head, rows in groups if rows]
    values = [value for _, rows in groups for row in rows for key, value in row["ratio"].items() if key.endswith("/native")]
    if not values:
        return None
    low, high = min(values + [0.8]) * 0.9, max(values + [4]) * 1.15
    left, right, top, step, width = 260, 70, 84, 22, 900
    height = top + step * sum(len(rows) + 1.6 for _, rows in groups) + 40

    def x(value):
        return left + (width - left - right) * math.log(value / low) / math.log(high / low)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img">',
           f"<title>{escape(title)}</title><style>{STYLE}</style>", '<rect width="100%" height="100%" fill="var(--paper)"/>',
           f'<text class="head" x="16" y="26" style="font-size:16px">{escape(title)}</text>', f'<text class="soft" x="16" y="46">{escape(note)}</text>']
    legend = [("a", "doppel", '<circle class="a" cx="{0}" cy="62" r="5"/>'), ("b", "qemu (tcg)", '<circle class="b" cx="{0}" cy="62" r="4.5"/>'),
              ("goal", "goal (doppel)", '<line class="goal" x1="{0}" x2="{0}" y1="55" y2="69"/>')]
    for place, (_, label, mark) in enumerate(legend):
        at = 24 + place * 120
        out += [mark.format(at), f'<text class="soft" x="{at + 10}" y="66">{label}</text>']
    for tick in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500):
        if low <= tick <= high:
            out += [f'<line class="{"one" if tick == 1 else "rule"}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - 30:.0f}"/>',
                    f'<text class="soft" x="{x(tick):.1f}" y="{height - 14:.0f}" text-anchor="middle">{tick:g}×</text>']
    y = top + step
    for head, rows in groups:
        out.append(f'<text class="head" x="16" y="{y:.0f}">{escape(head)}</text>')
        y += step
        for row in rows:
            out.append(f'<text x="{left - 12}" y="{y:.0f}" text-anchor="end">{escape(row["name"])}</text>')
            out.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y - 4:.0f}" y2="{y - 4:.0f}"/>')
            out += marks(row, x, y - 4)
            y += step
        y += 0.6 * step
    return "\n".join(out + ["</svg>", ""])


def marks(row, x, y):
    out = []
    native = row.get("median", {}).get("native")
    goal = row.get("goal")
    if goal and goal[0] == "native":
        out.append(f'<line class="goal" x1="{x(goal[1]):.1f}" x2="{x(goal[1]):.1f}" y1="{y - 7:.0f}" y2="{y + 7:.0f}"/>')
    for side, style, radius in (("qemu", "b", 4.5), ("doppel", "a", 5)):
        ratio = row["ratio"].get(side + "/native")
        if ratio:
            spread = ""
            if native and side in row.get("range", {}):
                spread = " (%s..%s)" % tuple(number(value / native) for value in row["range"][side])
            out.append(f'<circle class="{style}" cx="{x(ratio):.1f}" cy="{y:.0f}" r="{radius}"><title>{escape(row["name"])}: {side} '
                       f"{number(ratio)} times native{spread}</title></circle>")
            if side == "doppel" or "doppel/native" not in row["ratio"]:
                out.append(f'<text class="soft" x="{x(ratio) + 9:.1f}" y="{y + 4:.0f}">{number(ratio)}</text>')
    return out
