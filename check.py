"""What `python data.py check` says of a data set: what there is, what is missing, every problem, and what would stop training."""
import os

import numpy as np
from tqdm import tqdm

import config
import data
import media

MARK = "# problems that `python data.py check` found"


def _inspect(path):
    """Duration (or None), what is wrong (or None) and the settings of preparation (or None) of one media file, of which eleven frames
    are decoded, from the first to the last: reading bears that one of ten is broken."""
    try:
        source = media.open_media(path)
        count = (source.index(np.arange(source.num_frames)) >= 0).sum() if hasattr(source, "index") else source.num_frames  # without what a cut file lacks
        source.read(np.linspace(0, count - 1, 11).round().astype(int))
        return source.duration, source.note, getattr(source, "prepared", None)
    except (ValueError, OSError) as error:
        return None, str(error), None


def check(annotations, *, subsets=None, frames=None, features=None, durations=None, settings=None, required=None, train=None, workers=0, say=print):
    """Looks through a data set; returns (problems, fatal): [(subset, video, problem, detail)] and what keeps training from starting or ending, [str].

    subsets: those to look at; None: all that have segments. frames: folder; features: folder, HDF5 file or a list of them. settings:
    snippets, frames and stride that prepared frames should have been made for. required: those of "frames" and "features" that training reads;
    None: whatever is named, and a video needs one of them. train: the subset that needs segments, as others can be detected in without; None: all. One line a subset goes through `say`.
    """
    known = data.load_annotations(annotations)
    fatal = [f"the annotations have no subset {s!r}, only {sorted(known)}" for s in subsets or () if s not in known]
    chosen = [s for s in (subsets if subsets is not None else known) if s in known and (subsets is not None or len(known[s].segments))]
    problems, classes, widths = [], {}, {}
    sources = [] if features is None else features if isinstance(features, list) else [features]
    given, stops, unknown = {"frames": [frames] if frames else [], "features": sources}, [], set()
    for kind in given if required is None else required:
        if required and not given[kind]:
            fatal.append(f"the stages read {kind}: set data.{kind}")
        fatal += [f"there are no {kind} at {s}: no such file or folder" for s in given[kind] if not os.path.exists(s)]
    for subset in chosen:
        videos, names = known[subset], data.names_of(known[subset])
        classes[subset], owners = data.class_names(videos), videos.owners()
        for problem, rows in data.segment_problems(videos).items():
            problems += [(subset, names[owners[i]], problem, f"{videos.segments[i].tolist()} {videos.classes[videos.labels[i]]}, "
                          f"duration {videos.duration[owners[i]]}") for i in rows]
        have, bad = media.find_media(frames, names, say=say) if frames else {}, set()
        told = videos.duration.copy()
        for i, (seconds, wrong, prepared) in _inspect_all([(i, have[n]) for i, n in enumerate(names) if n in have], workers, subset):
            if seconds is None and wrong:
                bad.add(names[i])
            if wrong:
                problems.append((subset, names[i], "frames cannot be read" if names[i] in bad else "video is damaged", wrong))
            if seconds and abs(seconds - told[i]) > 0.01 * told[i]:
                problems.append((subset, names[i], "duration disagrees", f"{told[i]} s in the annotations, {seconds:.2f} s in {have[names[i]]}"))
            if prepared and settings and {k: prepared.get(k) for k in settings} != settings:
                problems.append((subset, names[i], "frames prepared otherwise", f"for {prepared}, but the config has {settings}"))
            told[i] = seconds if np.isnan(told[i]) and seconds else told[i]
        usable_frames = set(have) - bad
        found = [data.find_features(s, names) for s in sources]
        usable = {n for n in names if found and all(n in f for f in found)}
        for source, where in zip(sources, found):
            for name in tqdm(sorted(usable), f"features {subset}", unit="video", leave=False, disable=None):
                try:
                    width = data.finite(data.read_features(where[name]), where[name]).shape[1]
                    widths.setdefault(source, {}).setdefault(width, []).append((subset, name, data.shown(where[name])))
                except ValueError as error:
                    usable = usable - {name}
                    problems.append((subset, name, "features cannot be read", str(error)))
        told = data.fill_durations(names, told, told=durations, source=sources[0] if sources else None)
        neither = [n for n in names if n not in usable_frames and n not in usable] if frames or sources else []
        absent = set(neither)
        unknown |= {names[i] for i in np.flatnonzero(np.isnan(told))}  # training leaves these out
        problems += [(subset, names[i], "no duration", "neither the annotations nor frames or features tell it: set data.durations")
                     for i in np.flatnonzero(np.isnan(told)) if names[i] not in absent]
        problems += [(subset, n, "media missing", f"neither frames in {frames} nor features in {features}") for n in neither if n not in bad]
        say(f"{subset}: {len(names)} videos, {len(videos.segments)} segments, {np.nansum(told) / 3600:.2f} hours, {len(classes[subset])} classes"
            + (f"; {len(usable_frames)} with frames, {len(usable)} with features, {len(neither)} with neither" if frames or sources else ""))
        if len(neither) == len(names) and (frames or sources) and required is None:
            fatal.append(f"no video of subset {subset} has frames or features that can be read")
        fatal += [f"no video of subset {subset} has {kind} that can be read" for kind in required or () if not (usable_frames if kind == "frames" else usable)]
        if np.isnan(told).all():
            fatal.append(f"no video of subset {subset} has a duration, in the annotations or elsewhere")
        if train not in (None, subset) and not len(videos.segments):
            say(f"{subset}: no segments, so results will be written and not scored")
        elif not classes[subset]:
            fatal.append(f"subset {subset} has no segment that can be used")
    everything = sorted({c for names in classes.values() for c in names})
    problems += [(subset, "-", "label lacking", c) for subset, names in classes.items() for c in everything if names and c not in names]
    for source, by_width in widths.items():
        usual = max(by_width, key=lambda c: len(by_width[c]))
        problems += [(subset, name, "other channel count", f"{path} has {c} channels, most have {usual}")
                     for c, entries in by_width.items() if c != usual for subset, name, path in entries]
    for kind, wrong in (("frames", ["frames cannot be read"]), ("features", ["features cannot be read", "other channel count"])):
        stops += [f"{name} ({detail})" for _, name, problem, detail in problems
                  if problem in wrong and name not in unknown and (required is None or kind in required)]
    stops = list(dict.fromkeys(stops))
    fatal = [f"training cannot start: {words}" for words in fatal]
    return problems, fatal + ([f"training would stop at: {', '.join(stops[:10])}" + (f" and {len(stops) - 10} more" if stops[10:] else "")] if stops else [])


def _inspect_all(jobs, workers, subset):
    for i, result, error in media.run_jobs(_inspect, dict(jobs), workers, f"frames {subset}"):
        yield i, result if error is None else (None, str(error), None)


def write_problems(problems, path):
    """Lines of subset, video, problem and detail, between tabs. ValueError if `path` holds anything but such a list."""
    try:
        if os.path.lexists(path):
            with open(path, errors="replace") as f:
                if not f.readline().startswith(MARK):
                    raise ValueError(f"{path} is there already and is no list of problems: name another file with --problems")
        with open(f"{path}.part-{os.getpid()}", "x") as f:
            f.write("\n".join([f"{MARK}: {len(problems)}", *("\t".join(" ".join(str(x).split()) for x in p) for p in problems)]) + "\n")
        os.replace(f.name, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): name another file with --problems") from None


def main_check(args):
    settings = required = train = None
    if args.cfg:
        whole = config.load(args.cfg, args.set)
        cfg, stages = whole.data, whole.stages
        args.annotations, args.subsets = args.annotations or cfg.annotations, args.subsets or [cfg.train_subset, cfg.val_subset]
        args.frames, args.features, args.durations = args.frames or cfg.frames, args.features or cfg.features, args.durations or cfg.durations
        required = ["frames"] if {"lofi", "features"} & set(stages) or "pretrain" in stages and whole.pretrain.method.startswith("acp_plus") else []
        if not args.features and {"sola", "head", "detect"} & set(stages) and "features" not in stages:
            args.features = f"{whole.out}/features"
        required += ["features"] if args.features else []
        settings, train = data.settings_of(cfg), cfg.train_subset
    if not args.annotations:
        raise ValueError("name a config with --cfg, or an annotation file with --annotations")
    problems, fatal = check(args.annotations, subsets=args.subsets, frames=args.frames, features=args.features, durations=args.durations,
                            settings=settings, required=required, train=train, workers=args.workers)
    path = args.problems or f"{os.path.splitext(args.annotations)[0]}.problems.txt"
    write_problems(problems, path)
    kinds = {}
    for p in problems:
        kinds[p[2]] = kinds.get(p[2], 0) + 1
    print(f"{len(problems)} problems, listed in {path}")
    for kind, n in kinds.items():
        print(f"  {n} x {kind}" + (f" ({data.CONSEQUENCES[kind]})" if kind in data.CONSEQUENCES else ""))
    for p in problems[:10]:
        print("    " + "  ".join(p))
    for words in fatal:
        print(words)
    return 1 if fatal else 0
