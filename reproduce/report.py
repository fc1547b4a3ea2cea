"""Render the records of finished rows as Markdown: tables, and a verdict on each of the claims.

Rows, tables and claims stand in tables.yaml, the fixed prose in report_notes.md, and what somebody
reads in the results in notes_TOY.md beside them.
"""

import json
import pathlib
import re
import shlex
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import yaml

from config import Config
from reproduce.results import MARK
from tools.compare_runs import markdown_table

try:
    from scipy import stats
except ImportError:
    raise ImportError("reproduce needs SciPy: pip install -e '.[reproduce]'") from None

HERE = pathlib.Path(__file__).resolve().parent
LEVEL = 0.05  # of every test
# Measures that are not shown in percent.
SCALE = {"probe_auc": 1, "memory": 1, "peak_memory_gb": 1, "seconds": 1, "parameters": 1e-6}


def load_study():
    """Read tables.yaml; adds `needs`, {row: rows whose folders its config names}."""
    study = Config(yaml.safe_load((HERE / "tables.yaml").read_text("utf-8")))
    for kind in ("claims", "controls"):
        for i, entry in enumerate(study[kind]):
            weights = {row: float(Fraction(weight)) for row, weight in entry["weights"].items()}
            defaults = {"paper": None, "measure": "average", "source": "control"}
            study[kind][i] = Config(defaults | entry | {"weights": weights})
    study["needs"] = {}
    for row, keys in study.rows.items():
        folders = re.findall(r"\{\w+\}/(\w+)/", json.dumps(keys))
        study.needs[row] = list(dict.fromkeys(folders))
    return study


def with_needs(rows, needs):
    """Return the rows and all that they need, each after what it needs."""
    ordered = {}
    for row in rows:
        ordered |= dict.fromkeys([*with_needs(needs[row], needs), row])
    return list(ordered)


def paired_test(differences):
    """Test that the mean of differences, one a seed, is 0: a two-sided paired t-test.

    Returns mean, n, ahead (seeds above 0), p and its text; p is None for a single seed. If all are
    the same there is no spread to test against: p is 0, or 1 if they are 0.
    """
    x = np.asarray(differences, dtype=np.float64)
    test = SimpleNamespace(mean=x.mean(), n=len(x), ahead=(x > 0).sum(), p=None, p_text="-")
    if test.n > 1:
        test.p = float(abs(test.mean) <= 1e-12)
        if np.ptp(x) > 1e-12 * max(1.0, np.abs(x).max()):
            test.p = stats.ttest_1samp(x, 0).pvalue
        test.p_text = "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
    return test


def holm(p_values):
    """Return which hypotheses the step-down procedure of Holm and Bonferroni rejects."""
    rejected = [False] * len(p_values)
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[i] > LEVEL / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def judge(measured, claims, above="reproduced", below="not reproduced"):
    """Return the tests of the claims whose rows are there, with claim, verdict and after_holm."""
    tests = []
    for claim in claims:
        differences = measured.combine(claim.weights, claim.measure)
        if len(differences):
            test = paired_test(differences)
            test.claim = claim
            test.after_holm = "-"
            test.verdict = above if test.mean > 0 else below
            if test.n < 3:
                test.verdict = "no verdict"
            elif test.p >= LEVEL:
                test.verdict = "within noise"
            tests.append(test)
    judged = [test for test in tests if test.verdict != "no verdict"]
    for test, rejected in zip(judged, holm([test.p for test in judged]), strict=True):
        if test.verdict in (above, below):
            test.after_holm = "yes" if rejected else "no"
    return tests


class Measurements:
    """Measure rows over seeds. records: of one toy, in one setting or in none."""

    def __init__(self, records, study):
        self.study = study
        self.seeds = {}
        for record in sorted(records, key=lambda record: record["seed"]):
            self.seeds.setdefault(record["seed"], {})[record["row"]] = record

    def of(self, row, measure="average"):
        """Return a measure of a row, of each seed, (seeds,); NaN where it is missing."""
        values = [self._value(records, row, measure) for records in self.seeds.values()]
        return SCALE.get(measure, 100) * np.array(values, dtype=np.float64)

    def combine(self, weights, measure="average"):
        """Return the weighted sum of a measure of rows, of each seed that has all of them."""
        total = sum(weight * self.of(row, measure) for row, weight in weights.items())
        return total[~np.isnan(total)]

    def _value(self, records, row, measure):
        if measure.startswith("probe_"):
            sola_row, variant = self.study.probes.get(row, (None, None))
            probe = records.get(sola_row, {}).get("probe")
            return probe[variant][measure.removeprefix("probe_")] if probe else None
        if row not in records:
            return None
        if measure == "memory":  # of all that the row was made from
            made_from = [r for r in with_needs([row], self.study.needs) if r in records]
            peaks = [records[r]["peak_memory_gb"] for r in made_from]
            return max((peak for peak in peaks if peak is not None), default=None)
        return records[row]["mAP"].get(measure[1:]) if "@" in measure else records[row][measure]


def show(values, decimals=2, sign="", spread=True, center="mean", missing="-"):
    """Return the mean, or median, ± the standard deviation of values but NaN; `missing` of none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return missing
    text = f"{getattr(np, center)(values):{sign}.{decimals}f}"
    has_spread = spread and len(values) > 1
    return f"{text} ± {values.std(ddof=1):.{decimals}f}" if has_spread else text


def listed(values):
    """Return the distinct values as text."""
    return ", ".join(str(v) for v in sorted({v for v in values if v is not None})) or "unknown"


def verdict_table(tests, measured, with_holm=True):
    """Return the table of judged claims."""
    header = ["claim", "source", "paper", "here", "p", "seeds ahead", "verdict"]
    header += ["after Holm"] * with_holm + ["with true classes"]
    lines = []
    for test in tests:
        claim = test.claim
        decimals = 3 if claim.measure == "probe_auc" else 2
        cells = [f"{claim.id}: {claim.claim}", claim.source]
        cells.append("-" if claim.paper is None else f"{claim.paper:+.2f}")
        cells.append(show(measured.combine(claim.weights, claim.measure), decimals, "+"))
        cells += [test.p_text, f"{test.ahead} of {test.n}", f"**{test.verdict}**"]
        cells += [test.after_holm] * with_holm
        true_classes = ""
        if claim.measure == "average":
            differences = measured.combine(claim.weights, "true")
            true_classes = f"{show(differences, sign='+')}, p {paired_test(differences).p_text}"
        lines.append([*cells, true_classes])
    return markdown_table(header, lines)


def count_line(tests, claims):
    """Return how many of all claims came out how; those that are not judged are named."""
    judged = [test for test in tests if test.verdict != "no verdict"]
    count = [test.verdict for test in judged].count
    still = [(test.verdict, test.after_holm) for test in judged].count(("reproduced", "yes"))
    missing = [c.id for c in claims if c.id not in [test.claim.id for test in judged]]
    line = f"**Of {len(claims)} claims {count('reproduced')} reproduced** ({still} of them still "
    line += f"after Holm over the {len(judged)} judged), {count('within noise')} within noise, "
    line += f"{count('not reproduced')} not reproduced"
    rest = f"; {len(missing)} not judged yet ({', '.join(missing)})" if missing else ""
    return f"{line}{rest}."


def memory_lines(measured, study):
    """Return verdicts on claims about memory, which has no spread worth a test, from 3 seeds on."""
    text = ""
    for key, rows in study.memory.items():
        peaks = [measured.combine({row: 1}, "peak_memory_gb") for row in rows]
        if all(len(values) >= 3 for values in peaks):
            gb = [values.mean() for values in peaks]
            ratio = gb[1] / gb[0] if key == "less" else max(gb[:3]) / min(gb[:3])
            holds = ratio > 1 if key == "less" else ratio <= 1.2
            verdict = "reproduced" if holds else "not reproduced"
            text += study.texts[key].format(gb=gb, ratio=ratio, verdict=verdict)
    return text.strip()


def table(name, measured, study):
    """Return one table, with what is to be known below it."""
    rows = study.tables[name]["rows"]
    columns = {k: v for k, v in study.columns.items() if name in v.get("tables", [name])}
    lines = []
    for row, entry in rows.items():
        over, paper = entry.get("over"), entry.get("paper")
        cells = [entry["name"]]
        for column, options in columns.items():
            values = measured.of(row, options["measure"])
            if column == "over its ACP":
                values = values - measured.of(over) if over else None
            cells.append("" if values is None else show(values, **options.get("show", {})))
        cells.append(len(measured.combine({row: 1})))
        cells.append(" / ".join(f"{value:.2f}" for value in paper or []))
        cells.append(f"{paper[3] - rows[over]['paper'][3]:+.2f}" if paper and over else "")
        lines.append(cells)
    header = ["mAP (%)", *columns, "seeds", "paper: @0.5 / 0.75 / 0.95 / average", "over its ACP"]
    records = [r for seed in measured.seeds.values() for r in seed.values() if r["row"] in rows]
    sources = listed(record["class_source"] for record in records)
    notes = {"classes": records, "top1": "own top-1" in columns}
    notes["cpu"] = any(record["device"] == "cpu" for record in records)
    notes["seeds_differ"] = len({len(measured.combine({row: 1})) for row in rows} - {0}) > 1
    below = [study.texts[key].format(sources=sources) for key, holds in notes.items() if holds]
    title = f"### Table {name}: {study.tables[name]['title']}"
    return "\n\n".join([title, markdown_table(header, lines), " ".join(below)])


def summary(measured, study):
    """Return a table of the rows that matter most."""
    lines = []
    for row, entry in (study.tables["1"]["rows"] | study.tables["beyond"]["rows"]).items():
        if len(measured.combine({row: 1})):
            cells = [show(measured.of(row, m), 1) for m in ("average", "true", "ar_auc")]
            lines.append([entry["name"], *cells, show(measured.of(row, "memory"), spread=False)])
    header = ["%", "average mAP", "with true classes", "AR@AN area", "peak GB"]
    return markdown_table(header, lines) if lines else ""


def sensitivity_table(records, study):
    """Return the table of settings, over the seeds that have all rows of one."""
    seeds = {record["seed"] for record in records if record["setting"]}
    names = list(study.compared.values())
    lines = []
    for setting in [None, *study.settings]:
        own = [r for r in records if r["setting"] == setting and r["seed"] in seeds]
        measured = Measurements(own, study)
        mAP = np.array([measured.of(row) for row in study.compared])  # (rows, seeds)
        mAP = mAP[:, ~np.isnan(mAP).any(axis=0)]
        if mAP.size:
            order = np.argsort(-mAP.mean(axis=1), kind="stable")
            same = np.all(np.diff(mAP[order], axis=0) <= 0, axis=0)
            cells = [setting or "as it is", *map(show, mAP)]
            cells += [show(mAP[3] - mAP[1], sign="+"), show(mAP[3] - mAP[2], sign="+")]
            cells += [" > ".join(names[i] for i in order), f"{same.sum()} of {len(same)}"]
            lines.append(cells)
    header = ["average mAP (%)", *names, f"LoFi - {names[1]}", f"LoFi - {names[2]}"]
    header += ["order of the means", "seeds in that order"]
    return markdown_table(header, lines) if lines else ""


def made_by(toy, records, study):
    """Return with which commands, on which seeds, commits and machines the records were made."""
    command = study.toys[toy]["command"]
    overrides = dict.fromkeys(word for record in records for word in record["overrides"])
    command += f" --set {shlex.join(overrides)}" if overrides else ""
    if any(record["setting"] for record in records):
        command += f"`, then `{command} --sensitivity"
    keys = ("date", "git", "machine", "torch", "threads")
    values = {key: listed(record[key] for record in records) for key in keys}
    values["precision"] = listed(record["config"]["precision"] for record in records)
    seeds = listed(record["seed"] for record in records if not record["setting"])
    return study.texts["made"].format(commands=command, seeds=seeds, runs=len(records), **values)


def toy_section(toy, records, study, folder):
    """Return what there is to say of one toy, with remarks from `folder`."""
    measured = Measurements([record for record in records if not record["setting"]], study)
    path = pathlib.Path(folder, f"notes_{toy}.md")
    notes = path.read_text("utf-8") if path.exists() else ""
    in_short, heading, at_length = notes.partition("### ")
    parts = [f'## Toy "{toy}"', made_by(toy, records, study)]
    tests = judge(measured, study.claims)
    parts += [count_line(tests, study.claims)] if tests else []
    parts.append(in_short.strip())
    parts += [summary(measured, study), verdict_table(tests, measured)] if tests else []
    memory = memory_lines(measured, study)
    parts += ["Of memory, without a test:", memory] if memory else []
    parts.append(heading + at_length.strip())
    controls = judge(measured, study.controls, "higher", "lower")
    if controls:
        parts.append("### Controls: claimed by nobody, direction open")
        parts.append(verdict_table(controls, measured, with_holm=False))
    count = Counter(row for table in study.tables.values() for row in table["rows"])
    for name in study.tables:
        own = [row for row in study.tables[name]["rows"] if count[row] == 1]
        if any(len(measured.combine({row: 1})) for row in own):
            parts.append(table(name, measured, study))
    settings = sensitivity_table(records, study)
    if settings:
        parts += ["### Sensitivity to the toy's knobs", settings, study.texts["settings"]]
    return "\n\n".join(part for part in parts if part)


def render(records, study, folder):
    """Return the whole report, from records and the remarks in their folder alone."""
    records = list(records.values())
    sections = []
    for toy in study.toys:
        own = [record for record in records if record["toy"] == toy]
        if own:
            sections.append(toy_section(toy, own, study, folder))
    text = (HERE / "report_notes.md").read_text("utf-8").format(toys="\n\n".join(sections))
    return f"{MARK}\n\n{text}"
