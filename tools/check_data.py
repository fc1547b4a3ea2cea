"""Check a data set: what there is, what is missing, and every problem, listed in a file.

    python -m tools.check_data --cfg configs/anet13.yaml
    python -m tools.check_data --annotations GT.json --frames DIR --features DIR
    python -m tools.check_data --annotations GT.csv [--frames DIR] --json GT.json

Counts what each subset has, tells what its segments are like, and recommends settings for them. The
exit status is 1 if training could not start, or would stop at a broken file.
"""

import argparse
import math
import os
import signal
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

import config
import data
import media
from checkpoint import RunFolder, save_json, write_atomic
from data import first_names
from evaluate import is_ambiguous, markdown_table, refuse_to_replace
from media import InputError
from pretrain import gaps
from tools.jobs import run_jobs

SPREADS = {"seconds of a segment": "seconds", "classes of a video": "classes"}
SPREADS["% of a video that are action"] = "action"
MARK = "# problems found by `python -m tools.check_data`"

# What becomes of the segments that have a problem.
CONSEQUENCES = {
    "segment is not a number": "left out of training; evaluation refuses them",
    "segment ends before it starts": "left out",
    "segment outside the video": "clipped to it, and left out if nothing remains",
    "duplicate segment": "kept, as the official evaluation does",
    "label Ambiguous": "no action in training; evaluation ignores it, and detections there",
}
# Problems at which training stops, and the kind of file that has them.
FATAL = {"frames cannot be read": "frames", "features cannot be read": "features"}
FATAL["other channel count"] = "features"
Problem = namedtuple("Problem", "subset video kind detail")


@dataclass
class Sources:
    """What to look through: paths, and what training needs of them.

    subsets: None: all that have segments. settings: what frames should be prepared for, as in a
    ZIP's video.json. required: those of "frames" and "features" that training reads; None: a video
    needs one of them. train: the only subset that needs segments; None: all do. split: of a table:
    see data.load_annotations. json: a new file for the annotations.
    """

    annotations: str
    subsets: list[str] | None = None
    frames: str | None = None
    features: list[str] = ()
    durations: str | None = None
    settings: dict | None = None
    required: list[str] | None = None
    train: str | None = None
    split: tuple = ("training", "validation", 0.2)
    json: str | None = None


def segment_problems(video):
    """Yield (row, problem) of a video's segments; up to 10 ms beyond its end are no problem."""
    seen = set()
    for row, (start, end) in enumerate(video.segments.tolist()):
        label = video.labels[row]
        if not math.isfinite(start + end):
            yield row, "segment is not a number"
        elif end <= start:
            yield row, "segment ends before it starts"
        elif start < 0 or end > video.duration + 0.01:
            yield row, "segment outside the video"
        if (start, end, label) in seen:
            yield row, "duplicate segment"
        if is_ambiguous(label):
            yield row, "label Ambiguous"
        seen.add((start, end, label))


def inspect_media(path):
    """Return duration, what is wrong, and the settings of preparation of a video, each or None.
    Eleven frames are decoded, from the first to the last: reading accepts one broken in ten."""
    try:
        source = media.open_media(path)
        count = source.num_frames
        if isinstance(source, media.VideoFile):
            # Without the frames that a truncated file lacks.
            count = (source.index(np.arange(count)) >= 0).sum()
        source.read(np.linspace(0, count - 1, 11).round().astype(int))
    except media.InputError as error:
        return None, str(error), None
    return source.duration, source.note, getattr(source, "prepared", None)


class SubsetCheck:
    """What there is of a subset: names of videos by what they have or lack, and problems."""

    def __init__(self, name, videos, sources):
        self.name = name
        self.videos = list(videos)
        self.sources = sources
        self.names = [video.name for video in videos]
        self.classes = data.class_names(videos)
        self.problems = []
        self.usable = {"frames": set(), "features": set()}
        # Of each source of features: (video, path, channels).
        self.channels = {source: [] for source in sources.features}

    def add(self, video, kind, detail):
        self.problems.append(Problem(self.name, video, kind, detail))

    def check(self, workers, log):
        """Look at segments, frames, features and durations; log a summary."""
        known = {"durations": self.sources.durations, "features": self.sources.features}
        self.videos = data.fill_durations(self.videos, **known)
        if self.sources.frames:
            self.check_frames(workers, log)
        # Now durations are known from wherever they are.
        for video in self.videos:
            for row, problem in segment_problems(video):
                segment = f"{video.segments[row].tolist()} {video.labels[row]}"
                self.add(video.name, problem, f"{segment}, duration {video.duration}")
        self.check_features()
        self.check_what_is_missing()
        hours = sum(v.duration for v in self.videos if not math.isnan(v.duration)) / 3600
        num_segments = sum(len(video.labels) for video in self.videos)
        summary = f"{self.name}: {len(self.names)} videos, {num_segments} segments, "
        summary += f"{hours:.2f} hours, {len(self.classes)} classes"
        if self.sources.frames or self.sources.features:
            counts = [f"{len(names)} with {kind}" for kind, names in self.usable.items()]
            summary += f"; {', '.join(counts)}, {len(self.without_media)} with neither"
        log(summary)

    def check_frames(self, workers, log):
        """Inspect the videos' media, and take durations from them."""
        paths = media.find_media(self.sources.frames, self.names, log=log)
        jobs = {i: paths[name] for i, name in enumerate(self.names) if name in paths}
        self.usable["frames"] = set(paths)
        settings = self.sources.settings or {}
        # In the videos' order, however many workers there are.
        outcomes = run_jobs(inspect_media, jobs, workers, f"frames {self.name}")
        for i, result, error in sorted(outcomes, key=lambda outcome: outcome[0]):
            duration, wrong, prepared = result or (None, str(error), None)
            video = self.videos[i]
            if wrong and duration is None:
                self.usable["frames"].remove(video.name)
                self.add(video.name, "frames cannot be read", wrong)
            elif wrong:
                self.add(video.name, "video is damaged", wrong)
            if duration and abs(duration - video.duration) > 0.01 * video.duration:
                both = f"{video.duration} s in the annotations, {duration:.2f} s in {jobs[i]}"
                self.add(video.name, "duration disagrees", both)
            if prepared and {key: prepared.get(key) for key in settings} != settings:
                both = f"for {prepared}, but the config has {settings}"
                self.add(video.name, "frames prepared otherwise", both)
            if duration and math.isnan(video.duration):
                self.videos[i] = replace(video, duration=duration)

    def check_features(self):
        """Read the features of all videos that have them in every source."""
        found = {source: data.find_features(source, self.names) for source in self.channels}
        shared = set.intersection(*map(set, found.values())) if found else set()
        self.usable["features"] = set(shared)
        bar = {"desc": f"features {self.name}", "unit": "video", "leave": False, "disable": None}
        for source, paths in found.items():
            for name in tqdm(sorted(shared), **bar):
                try:
                    x = data.read_features(paths[name])
                    data.check_finite(x, paths[name])
                    row = name, paths[name], x.shape[1]
                    self.channels[source].append(row)
                except media.InputError as error:
                    self.usable["features"].discard(name)
                    self.add(name, "features cannot be read", str(error))

    def check_what_is_missing(self):
        """Note the videos without a duration, and those without frames and features."""
        sources = self.sources
        self.without_duration = {v.name for v in self.videos if math.isnan(v.duration)}
        usable = self.usable["frames"] | self.usable["features"]
        unreadable = {p.video for p in self.problems if p.kind == "frames cannot be read"}
        given = sources.frames or sources.features
        self.without_media = [name for name in self.names if given and name not in usable]
        for name in self.names:
            if name not in self.without_media and name in self.without_duration:
                where = "neither annotations nor frames or features tell: set data.durations"
                self.add(name, "no duration", where)
            elif name in self.without_media and name not in unreadable:
                places = " or ".join(filter(None, [sources.frames, *sources.features]))
                self.add(name, "media missing", f"no file of that name in {places}")

    def obstacles(self, log):
        """Yield what of this subset keeps training from starting."""
        sources = self.sources
        kinds = [kind for kind in sources.required or () if not self.usable[kind]]
        if sources.required is None and self.without_media == self.names:
            kinds = ["frames or features"]
        for kind in kinds:
            yield f"no video of subset {self.name} has {kind} that can be read"
        if len(self.without_duration) == len(self.names):
            yield f"no video of subset {self.name} has a duration: set data.durations"
        if sources.train not in (None, self.name) and not any(v.labels for v in self.videos):
            log(f"{self.name}: no segments, so results will be written and not scored")
        elif not self.classes:
            yield f"subset {self.name} has no usable segment"


def check(sources, workers=0, log=print):
    """Look through a data set; return ([Problem], [what keeps training from starting or ending]).
    Logs what there is. workers: processes that open the frames; 0: this one."""
    known = data.load_annotations(sources.annotations, sources.split)
    labelled = [name for name, videos in known.items() if any(v.labels for v in videos)]
    if sources.annotations.lower().endswith(data.TABLES):
        # Its few videos are all somebody's own: one without a segment may be missing, too.
        labelled = list(known)
        sources = replace(sources, train=sources.train or sources.split[0])
    chosen = labelled if sources.subsets is None else sources.subsets
    obstacles = list(missing_sources(sources, chosen, known))
    checks = [SubsetCheck(name, known[name], sources) for name in chosen if name in known]
    for subset in checks:
        subset.check(workers, log)
        obstacles += subset.obstacles(log)
        known[subset.name] = subset.videos
    for line in describe(checks):
        log(line)
    if sources.json:
        if os.path.lexists(sources.json):
            raise InputError(f"{sources.json} already exists: name another --json")
        save_json(data.activitynet(known), sources.json)
    problems = [problem for subset in checks for problem in subset.problems]
    problems += compare_subsets(checks, sources)
    fatal = [f"training cannot start: {obstacle}" for obstacle in obstacles]
    left_out = set().union(*(subset.without_duration for subset in checks))
    read = FATAL.values() if sources.required is None else sources.required
    stops = [p for p in problems if FATAL.get(p.kind) in read and p.video not in left_out]
    stops = list(dict.fromkeys(f"{p.video} ({p.detail})" for p in stops))
    if stops:
        fatal.append(f"training would stop at: {first_names(stops)}")
    return problems, fatal


def missing_sources(sources, chosen, known):
    """Yield what is required and not named, or named and not there."""
    for subset in chosen:
        if subset not in known:
            yield f"the annotations have no subset {subset!r}, only {sorted(known)}"
    given = {"frames": [sources.frames] if sources.frames else [], "features": sources.features}
    for kind in given if sources.required is None else sources.required:
        if sources.required and not given[kind]:
            yield f"the stages read {kind}: set data.{kind}"
        for path in given[kind]:
            if not os.path.exists(path):
                yield f"there are no {kind} at {path}: no such file or folder"


def compare_subsets(checks, sources):
    """Yield a Problem for each video that others have, spelt otherwise, and for features of
    unusual width."""
    spelt = {}
    for subset, name in [(check.name, name) for check in checks for name in check.names]:
        other = spelt.setdefault(min(media.spellings(name)), (subset, name))
        if other[0] != subset:
            yield Problem(subset, name, "video in two subsets", f"{other[1]} in {other[0]}")
    for source in sources.features:
        rows = [(subset.name, *row) for subset in checks for row in subset.channels[source]]
        usual = Counter(channels for *_, channels in rows).most_common(1)
        for subset, video, path, channels in rows:
            if channels != usual[0][0]:
                detail = f"{path} has {channels} channels, most have {usual[0][0]}"
                yield Problem(subset, video, "other channel count", detail)


def statistics(videos):
    """Return what training sees of videos, as arrays: of each segment "seconds", "share" (of its
    video), "label", "owner" (index of its video); of each video "action" (in %), "classes" (how
    many). A video of unknown duration is taken to end with its last segment."""
    segments, action, classes = [], [], []
    for i, video in enumerate(videos):
        if math.isnan(video.duration):
            video = replace(video, duration=np.nanmax(video.segments, initial=1e-9))
        times, labels = video.actions
        shares = (times[:, 1] - times[:, 0]).tolist()
        segments += [(x * video.duration, x, y, i) for x, y in zip(shares, labels, strict=True)]
        action.append(100 - 100 * sum(b - a for a, b in gaps(times, 0)) if labels else 0)
        classes.append(len(set(labels)))
    columns = zip(*segments, strict=True) if segments else [[]] * 4
    names = ("seconds", "share", "label", "owner", "action", "classes")
    return dict(zip(names, map(np.array, (*columns, action, classes)), strict=True))


def describe(checks):
    """Yield lines on what was read: by class and subset, of a video, and what to set for it."""
    known = {subset.name: statistics(subset.videos) for subset in checks}
    labels = sorted(set().union(*(s["label"].tolist() for s in known.values())))
    counts = ("videos", "segments", "seconds", "segments a video")
    rows = [["class", *(f"{name} {count}" for name in known for count in counts)]]
    for label in labels:
        rows.append([label])
        for s in known.values():
            of = s["label"] == label
            videos, seconds = len(set(s["owner"][of].tolist())), s["seconds"][of].sum()
            rows[-1] += [videos, of.sum(), f"{seconds:.1f}", f"{of.sum() / max(videos, 1):.1f}"]
    yield markdown_table(rows[0], rows[1:])
    spellings = Counter(label.casefold() for label in labels)
    if twins := [label for label in labels if spellings[label.casefold()] > 1]:
        yield f"classes that differ in capital letters only: {first_names(twins)}"
    spreads = []
    for name, s in known.items():
        if lacking := sorted(set(labels).difference(s["label"].tolist())):
            yield f"{name} lacks {len(lacking)} of {len(labels)} classes: {first_names(lacking)}"
        for title, key in SPREADS.items():
            spread = np.quantile(s[key], (0, 0.1, 0.5, 0.9, 1)) if len(s[key]) else [math.nan] * 5
            spreads.append([f"{name}: {title}", *(f"{value:.3g}" for value in spread)])
    yield markdown_table(["", "least", "10 % below", "median", "90 % below", "most"], spreads)
    yield from recommend([video for subset in checks for video in subset.videos])


def recommend(videos):
    """Yield settings for videos, with the reason."""
    s = statistics(videos)
    if not len(s["seconds"]):
        return
    classes = np.median(s["classes"][s["classes"] > 0])
    word = "segment" if classes >= 3 else "video"
    yield f"recommended: classes={word}: classes in the median video with actions: {classes:g}"
    # Fractions of a video are not exact.
    seconds, longest = np.quantile(s["seconds"], (0.1, 0.95)).round(2).clip(0.01)
    share = np.quantile(s["share"], 0.1)
    reason = "nine tenths of the segments then cover 2 snippets"
    snippets = math.ceil(2 / share)
    if snippets <= 200:  # else windows
        yield f"recommended: video.snippets={max(snippets, 32)} or more: {reason}"
    else:
        rate = math.ceil(20 / seconds) / 10
        longest = math.ceil(rate * longest)
        length = max(64, 32 * math.ceil(longest / 16))
        why = f"{reason}, {seconds:.3g} s; without windows only with {snippets} a video"
        yield f"recommended: data.windows=true video.rate={rate:g}: {why}"
        yield f"recommended: video.snippets={length} (a window) gtad.durations={longest}: for 95 %"
    if without := sum(math.isnan(video.duration) for video in videos):
        yield f"recommended: data.durations=FILE, or data.frames: {without} videos have no duration"


def write_problems(problems, path):
    """Write a line for each problem; raise InputError if `path` holds anything but such a list."""
    refuse_to_replace(path, MARK)
    lines = [f"{MARK}: {len(problems)}"]
    lines += ["\t".join(" ".join(text.split()) for text in problem) for problem in problems]
    write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode(errors="replace")))


def find_sources(args):
    """Return the Sources of the command line; a config has what is not named there."""
    keys = ("annotations", "frames", "features", "durations", "json")
    given = {key: getattr(args, key) for key in keys if getattr(args, key)}
    if not args.cfg:
        return Sources(**given)
    cfg = config.load_config(args.cfg, args.set)
    stages = set(cfg.stages)
    features = data.as_list(cfg.data.features or [])
    if not features and {"sola", "head", "detect"} & stages and "features" not in stages:
        features = [RunFolder(cfg.out).features]
    subsets = [cfg.data.train_subset, cfg.data.val_subset]
    known = {key: cfg.data[key] for key in ("annotations", "frames", "durations")}
    sources = Sources(**known | {"features": features} | given)
    sources.required = ["frames"] if config.reads_frames(cfg, stages) else []
    sources.required += ["features"] if sources.features else []
    sources.subsets, sources.train = subsets, cfg.data.train_subset
    sources.split = (*subsets, cfg.data.val_share)
    sources.settings = config.frame_settings(cfg)
    return sources


def main(argv=None):
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("tools.check_data", None, __doc__, formatter_class=raw)
    add = parser.add_argument
    add("--cfg", help="a YAML of configs/, which names all paths")
    add("--set", nargs="+", default=[], action="extend", metavar="key.sub=value")
    add("--annotations", help="ActivityNet JSON, or a table: video, start, end, label[, subset]")
    add("--json", metavar="FILE", help="write the annotations there, in ActivityNet's layout")
    add("--frames", help="folder of prepared ZIPs, folders of JPEG frames or video files")
    add("--features", nargs="+", default=[], help="folders or HDF5 files of features")
    add("--durations", help="JSON {video: seconds}, for annotations without durations")
    add("--problems", help="list of problems to write; default: NAME.problems.txt beside NAME.json")
    add("--workers", type=int, default=0, help="processes that open the frames; default: 0, none")
    args = parser.parse_args(argv)
    with config.one_line_errors("tools.check_data"):
        if not args.cfg and not args.annotations:
            raise InputError("name a config with --cfg, or a file with --annotations")
        sources = find_sources(args)
        problems, fatal = check(sources, max(args.workers, 0))
        path = args.problems or f"{os.path.splitext(sources.annotations)[0]}.problems.txt"
        write_problems(problems, path)
        print(f"{len(problems)} problem{'s' * (len(problems) != 1)}, listed in {path}")
        for kind, count in Counter(problem.kind for problem in problems).items():
            consequence = f" ({CONSEQUENCES[kind]})" if kind in CONSEQUENCES else ""
            print(f"  {count} x {kind}{consequence}")
        for line in ["    " + "  ".join(problem) for problem in problems[:10]] + fatal:
            print(line)
        return 1 if fatal else 0


if __name__ == "__main__":
    # `| head` ends it quietly; SIGTERM ends its worker processes too, as Ctrl-C does.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
