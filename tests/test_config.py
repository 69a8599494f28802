"""Options, strictly read: types, bounds, contradictions, YAML, losses as text, names of models. One test imports torch."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune import config
from preftune.cli import VERBS, parse, split_verb
from preftune.config import (
    ALSO_CALLED,
    CONTRADICTIONS,
    GROUPS,
    LOSS_ALSO_CALLED,
    LOSS_BOUNDS,
    Chat,
    Compare,
    DataCheck,
    DataConvert,
    DataShow,
    Demo,
    Dpo,
    Env,
    Evaluate,
    Logprobs,
    OnlineDpo,
    Pair,
    Ppo,
    Rate,
    Report,
    Reward,
    Sample,
    Score,
    Sft,
    build,
    is_path_like,
    load_config,
    load_yaml,
    loss_facts,
    loss_terms,
    parse_loss,
    resolved_yaml,
    scored_terms,
    specs,
)
from preftune.errors import DataError, ModelError, PreftuneError, UsageError

CLASSES = [verb.options for verb in VERBS.values()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with what a run needs, and we are in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "other.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    return tmp_path


ROLL = "--model model --data pairs.jsonl --output out --reward lexicon:pairs.jsonl"
DPO = ["--model", "model", "--data", "pairs.jsonl", "--output", "out"]


def dpo(*words: str) -> Dpo:
    return parse([*DPO, *words], Dpo)


# --- what is refused: (words, fragments of the one message) ---------------------------------------------------------------------

INVALID_WORDS: list[tuple[str, str]] = [
    ("--bta 0.1", "unknown option --bta (did you mean '--beta'?)"),
    ("--learning-rate 1e-5", "did you mean '--lr'?"),
    ("--output_dir x", "did you mean '--output'?"),
    ("--per_device_train_batch_size 4", "did you mean '--batch-size'?"),
    ("--quux 3", "unknown option --quux"),
    ("-beta 1", "'-beta' is not an option (did you mean '--beta'?)"),
    ("–beta 1", "did you mean '--beta'?"),
    ("beta 1", "'beta' is not an option"),
    ("--beta", "--beta needs a value"),
    ("--beta --lr 1", "--beta needs a value, not the option --lr"),
    ("--beta 0.1 --beta 0.2", "--beta is given twice"),
    ("--skip-bad --no-skip-bad", "--skip-bad is given twice"),
    ("--skip-bad=true", "--skip-bad takes no value; write --skip-bad or --no-skip-bad"),
    ("--no-beta", "unknown option --no-beta"),
    ("--beta -0.1", "--beta must be a number above 0, not -0.1"),
    ("--beta=-1e-5", "--beta must be a number above 0, not -1e-05"),
    ("--beta 0", "--beta must be a number above 0, not 0.0"),
    ("--beta high", "--beta must be a number above 0, not 'high'"),
    ("--beta 0,1", "not '0,1'"),
    ("--beta 1_000", "not '1_000'"),
    ("--beta ٣", "--beta must be a number"),
    ("--beta nan", "--beta must be finite"),
    ("--beta inf", "--beta must be finite"),
    ("--beta 1e999", "--beta must be finite"),
    ("--lr fast", "--lr must be auto or a number above 0, not 'fast'"),
    ("--lr 0", "--lr must be auto or a number above 0"),
    ("--epochs 0", "--epochs must be a number above 0"),
    ("--batch-size 0", "--batch-size must be a whole number of at least 1, not 0"),
    ("--batch-size 3.0", "--batch-size must be a whole number of at least 1, not '3.0'"),
    ("--batch-size 1e3", "not '1e3'"),
    ("--batch-size 99999999999999999999", "--batch-size must be a whole number"),
    ("--seed -1", "--seed must be a whole number of at least 0, not -1"),
    ("--seed one", "--seed must be a whole number"),
    ("--holdout 0.95", "--holdout must be a number from 0 to 0.9, not 0.95"),
    ("--label-smoothing 0.5", "--label-smoothing must be a number of at least 0 and below 0.5, not 0.5"),
    ("--warmup 1.5", "--warmup must be a number from 0 to 1"),
    ("--adam-beta1 1", "--adam-beta1 must be a number of at least 0 and below 1"),
    ("--max-length 1", "--max-length must be a whole number of at least 2"),
    ("--keep 0", "--keep must be a whole number of at least 1"),
    ("--clip -1", "--clip must be a number of at least 0"),
    ("--finish sometimes", "--finish must be one of auto, always, never, not 'sometimes'"),
    ("--dtype fp16", "(did you mean 'bf16'?)"),
    ("--schedule cosin", "(did you mean 'cosine'?)"),
    ("--allow equal leek", "--allow must be one of equal, contradicting, leak, not 'leek' (did you mean 'leak'?)"),
    ("--allow leak leak", "--allow names 'leak' twice"),
    ("--data pairs.jsonl", "--data names 'pairs.jsonl' twice"),
    ("--device gpu", "--device must be auto, cpu, cuda or cuda:N, not 'gpu'"),
    ("--eval-reward length", "--eval-reward must be lexicon:FILE or python:FILE.py:FUNCTION"),
    ("--eval-reward python:x.py:os.system('x')", "--eval-reward must be"),
    ("--template ", "--template is empty"),
    ("--template=\ud800", "--template is not readable as UTF-8 text"),
    ("--template=a\0b", "--template is not readable as UTF-8 text"),
    ("--loss simpoo", "--loss: no loss is called 'simpoo' (did you mean 'simpo'?)"),
    ("--loss dpo", "did you mean 'sigmoid'?"),
    ("--loss ipo", "'ipo-sum' or 'ipo-mean'"),
    ("--loss sigmoid+", "'sigmoid+' is not a loss nor a weighted sum"),
    ("--loss 0.1nll", "is not a loss nor a weighted sum"),
    ("--loss x*nll", "is not a loss nor a weighted sum"),
    ("--loss sigmoid+0*nll", "the weight of 'nll' must be above 0"),
    ("--loss -1*nll", "the weight of 'nll' must be above 0"),
    ("--loss sigmoid+sigmoid", "'sigmoid' stands twice"),
    ("--loss __import__('os')", "is not a loss nor a weighted sum"),
    ("--loss.gama 1 --loss simpo", "the loss 'simpo' takes no 'gama' (did you mean '--loss.gamma'?)"),
    ("--loss.gamma 1", "the loss 'sigmoid' takes no 'gamma'"),
    ("--loss.beta 0", "--loss.beta must be a number above 0"),
    ("--loss.beta high", "--loss.beta must be a number above 0, not 'high'"),
    ("--loss.beta 1 --loss.beta 2", "--loss.beta is given twice"),
    ("--loss robust --loss.noise 0.5", "--loss.noise must be a number of at least 0 and below 0.5"),
    ("--beta 0.1 --loss.beta 0.1", "--beta and --loss.beta are the same option"),
    ("--loss ipo-sum --beta 0.1", "--beta: the loss 'ipo-sum' takes no 'beta'; it takes --loss.tau"),
    ("--loss nll --beta 0.1", "takes no arguments"),
    ("--loss-arguments gamma", "unknown option --loss-arguments"),
    ("--label-smoothing 0.1 --loss kto", "the loss 'kto' has no soft form"),
    ("--label-smoothing 0.1 --loss sigmoid+kto", "the loss 'kto' has no soft form"),
    ("--label-smoothing 0.1 --loss nll", "the loss 'nll' has no soft form"),
    ("--label-smoothing 0.1 --loss sigmoid+robust", "the loss 'robust' corrects for wrong labels itself, by --loss.noise"),
    ("--loss ld-dpo --loss.tail 1.5", "--loss.tail must be a number from 0 to 1"),
    ("--loss exo --loss.epsilon 0", "--loss.epsilon must be a number above 0 and below 0.5"),
    ("--eval-data other.jsonl --holdout 0.1", "--holdout has nothing to do with --eval-data given"),
    ("--eval-data pairs.jsonl", "--eval-data names a file of --data"),
    ("--holdout 0 --eval-every 5", "--eval-every has nothing to evaluate"),
    ("--lora-alpha 8", "--lora-alpha has no effect without --lora RANK"),
    ("--lora-targets q_proj", "--lora-targets has no effect without --lora RANK"),
    ("--reference-update hard --reference-alpha 0.5", "--reference-alpha has no effect without --reference-update soft"),
    ("--reference-every 4", "--reference-every has no effect without --reference-update soft or hard"),
    ("--reference-update hard --loss simpo", "--reference-update: the loss 'simpo' reads no reference"),
    ("--freeze embed --lora 4", "--freeze has no effect with --lora"),
    ("--freeze embed --adapter continue", "--freeze has no effect with --lora or --adapter continue"),
    ("--adapter continue --lora 4", "--adapter continue trains the adapter that --model is"),
    ("--optimiser rmsprop --adam-beta1 0.8", "--adam-beta1 is AdamW's: --optimiser rmsprop does not take it"),
    ("--optimiser rmsprop --adam-beta2 0.9", "--adam-beta2 is AdamW's"),
    ("--optimiser rmsprop --weight-decay 0.1", "--weight-decay is AdamW's"),
    ("--optimiser lion", "--optimiser must be one of adamw, rmsprop, adamw-8bit"),
    ("--holdout 0 --patience 2", "--patience has nothing to evaluate"),
    ("--holdout 0 --publish best", "--publish best has no held-out loss to go by"),
    ("--stop plateau", "--stop plateau watches the reward of the model's own answers: give --eval-reward RULE"),
    ("--stop plateau --eval-reward lexicon:x --patience 3", "--stop plateau and --patience each say when to stop"),
    ("--stop plateau --eval-reward lexicon:x --holdout 0", "--stop needs held-out prompts"),
    ("--stop platau --eval-reward lexicon:x", "(did you mean 'plateau'?)"),
    ("--publish reward", "--publish reward has no reward to go by"),
    ("--plateau-window 8", "--plateau-window has no effect without --stop plateau"),
    ("--plateau-window 3 --stop plateau --eval-reward lexicon:x", "--plateau-window must be a whole number of at least 4"),
    ("--plateau-band 0.1", "--plateau-band has no effect without --stop plateau"),
    ("--kl-limit 0.1", "--kl-limit has no effect without --stop plateau or --publish reward"),
    ("--kl-limit 0", "--kl-limit must be a number above 0"),
    ("--kl-unit sequence", "--kl-unit has no effect without --stop plateau or --publish reward"),
    ("--kl-unit sequence --publish reward --eval-reward lexicon:x", "--kl-unit sequence needs its own --kl-limit"),
    ("--eval-truth lexicon:x", "--eval-truth has no proxy to stand beside"),
    ("--eval-truth lexicon:x --eval-reward lexicon:x", "--eval-truth is --eval-reward itself"),
    ("--min-improvement 0.1", "--min-improvement has no effect without --patience N"),
    ("--early-stopping-patience 3", "did you mean '--patience'?"),
    ("--optim rmsprop", "did you mean '--optimiser'?"),
    ("--warmup 1 --schedule cosine", "--schedule has no effect"),
    ("--eval-prompts 0 --eval-reward lexicon:x", "--eval-reward has nothing to score"),
    ("--eval-prompts 0 --eval-samples 2", "--eval-samples has no effect"),
    ("--eval-prompts 0 --sample-tokens 8", "--sample-tokens has no effect"),
    ("--resume runs/x", "--output cannot be given with --resume: the run goes on in its own folder"),
    ("--config nothing.yaml", "--config nothing.yaml: no such file or directory"),
    ("--config model", "--config model: is a directory"),
    ("--config https://host/run.yaml", "a configuration is a file on this machine, not an address"),
    ("--config a.yaml --config b.yaml", "--config is given twice"),
]


@pytest.mark.parametrize(("words", "fragment"), INVALID_WORDS, ids=[words for words, _ in INVALID_WORDS])
def test_invalid_words_are_refused(here, words, fragment):
    with pytest.raises(UsageError) as error:
        dpo(*words.split(" "))
    assert fragment in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


ENDPOINT = "--model endpoint:http://127.0.0.1:1/v1#m --data pairs.jsonl --output s"
ASKING = ("--concurrency 2", "--retries 2", "--timeout 2", "--key-variable NAME", "--price-in 2", "--price-out 2")
TRAIN = "--model model --data pairs.jsonl --output out"
OTHER_VERBS: list[tuple[type, str, str]] = [
    (Dpo, "", "--model, --data and --output must be given, for example:\n  preftune dpo --model"),
    (Dpo, "--model model --data pairs.jsonl", "--output must be given"),
    (Dpo, "--resume runs/x --lr 1e-3", "--resume runs/x: no config.yaml there"),
    (Dpo, "--resume runs/x --lr auto", "--resume runs/x: no config.yaml there"),
    (Dpo, "--resume runs/x --loss.beta 1", "--resume runs/x: no config.yaml there"),
    (Dpo, "--resume runs/x --allow-change dta", "--allow-change must be"),
    (Dpo, "--model model --data pairs.jsonl --output out --allow-change data", "--allow-change has no effect without --resume"),
    (Dpo, "--model model --data pairs.jsonl --output model", "--output is also an input"),
    (Dpo, "--model gpt2 --data pairs.jsonl --output out --offline", "--model gpt2: is not a folder here, and --offline refuses"),
    (Reward, f"{TRAIN} --average", "--average has no effect without --members N"),
    (Reward, f"{TRAIN} --members 2 --member 1", "--member is one member, and --members makes all of them"),
    (Reward, f"{TRAIN} --target labels --from-scores all", "--from-scores has no effect: --target labels and scores read no judgements"),
    (Reward, f"{TRAIN} --target classes --classes good", "--target classes needs --classes, two or more, the wanted one last"),
    (Reward, f"{TRAIN} --target labels --classes bad good", "--classes has no effect without --target classes"),
    (Dpo, f"{TRAIN} --value copy", "--value has no effect: only --loss value-learned learns a value"),
    (Dpo, f"{TRAIN} --value-lr 2", "--value-lr has no effect: only --loss value-learned learns a value"),
    (Reward, f"{TRAIN} --by source --holdout 0", "--by has nothing to evaluate"),
    (Reward, f"{TRAIN} --by source --target labels", "--by is told of pairs"),
    (Reward, f"{TRAIN} --publish reward", "--publish reward goes by samples of a policy"),
    (Reward, f"{TRAIN} --loss sigmoid", "--loss: the loss 'sigmoid' reads log-probs of a policy"),
    (Reward, f"{TRAIN} --loss binary", "--loss: the loss 'binary' learns from labels: --target labels"),
    (Reward, f"{TRAIN} --loss.theta 1 --loss rao-kupper", "--loss.theta must be a number above 1"),
    (Reward, f"{TRAIN} --eval-prompts 3", "unknown option --eval-prompts"),
    (Dpo, f"{TRAIN} --loss bradley-terry", "--loss: the loss 'bradley-terry' reads the scores of a reward model"),
    (Logprobs, "--model model", "--data must be given"),
    (Logprobs, "--model model --data pairs.jsonl --output pairs.jsonl", "--output is also an input"),
    (Logprobs, "--model model --data pairs.jsonl --k 3", "unknown option --k"),
    (Sample, "--model model --data pairs.jsonl", "--output must be given"),
    (Sample, "--model model --data pairs.jsonl --output s.jsonl --temperature 0 --k 4", "--k makes equal samples"),
    (Sample, "--model model --data pairs.jsonl --output s.jsonl --temperature 0 --top-p 0.9", "--top-p has no effect"),
    (Sample, "--model model --data pairs.jsonl --output s.jsonl --temperature 0.7 --reference model", "--reference estimates KL"),
    (Sample, "--top-p 0", "--top-p must be a number above 0 and at most 1"),
    (Sample, "--max-new-tokens 8", "did you mean '--sample-tokens'?"),
    (Sample, "--prompts x.txt", "did you mean '--data'?"),
    *((Sample, f"{ENDPOINT} {words}", f"{words.split()[0]} has no effect on a model behind an endpoint") for words in (
        "--reference model", "--batch-size 4", "--dtype bf16", "--device cpu", "--threads 1", "--bos never", "--template plain",
        "--control-tokens split")),
    *((Sample, f"--model model --data pairs.jsonl --output s {words}", f"{words.split()[0]} has no effect without --model endpoint:")
      for words in ("--api chat", "--skip-bad", *ASKING)),
    (Sample, "--model endpoint:http://h --data pairs.jsonl --output s", "expected endpoint:http://HOST:PORT/v1#NAME"),
    (Sample, "--model endpoint:http://u:p@h/v1#m --data pairs.jsonl --output s", "must not hold a user, a password or a query"),
    (Sample, "--model endpoint:http://h/v1?key=s#m --data pairs.jsonl --output s", "must not hold a user, a password or a query"),
    (Sample, "--model endpoint:http://h:x/v1#m --data pairs.jsonl --output s", "not an address"),
    (Sample, "--model endpoint:http://h/v1#m --data pairs.jsonl --output s --offline", "--offline refuses an endpoint that is not on this"),
    *((Score, f"--data pairs.jsonl --output s --reward lexicon:x {words}", f"{words.split()[0]} has no effect without a judge")
      for words in ("--question other.jsonl", "--judge-tokens 9", *ASKING)),
    (Score, "--data pairs.jsonl --output s --reward lexicon:x --judge endpoint:http://h/v1#m", "--judge compares, --reward scores"),
    (Score, "--data pairs.jsonl --output s --reward lexicon:x --combine sum", "--combine has no effect on fewer than two"),
    *((Score, f"--data pairs.jsonl --output s --reward lexicon:x {words}", f"{words.split()[0]} has no effect without a reward model")
      for words in ("--micro-tokens 9", "--dtype bf16", "--device cpu")),
    (Score, "--data pairs.jsonl --output s --reward length", "--reward must be lexicon:FILE or python:FILE.py:FUNCTION"),
    (Score, "--data pairs.jsonl --output s --judge http://h/v1#m", "--judge must be endpoint:http://HOST:PORT/v1#NAME"),
    (Score, "--data pairs.jsonl --output pairs.jsonl --reward lexicon:x", "--output is also an input"),
    *((Pair, f"--data pairs.jsonl --output s --ask 3 {words}", f"{words.split()[0]} has no effect with --ask")
      for words in ("--how all", "--soft 1", "--replace")),
    *((Pair, f"--data pairs.jsonl --output s {words}", fragment) for words, fragment in (
        ("--ask-by disagreement", "--ask-by has no effect without --ask"), ("--how ranking --soft 1", "--soft is of pairs"),
        ("--how ranking --margin 1", "--margin is of pairs"), ("--limit 3", "--limit has no effect: only --how all"),
        ("--of 2", "--of has no effect without --how best-of-n"), ("--beta 1", "--beta has no effect without --how rejection"),
        ("--r-max 2", "--r-max has no effect without --how rejection"), ("--reference model", "--reference has no effect without"),
        ("--how rejection", "--how rejection needs --beta"), ("--r-max high", "--r-max must be prompt or a number"))),
    (Chat, "", "--model must be given"),
    (Chat, "model model", "--model names 'model' twice"),
    (Chat, "model a b", "--model takes one model, or two"),
    (Chat, "model --votes v.jsonl", "--votes needs two models"),
    (Chat, "model --temperature 0 --top-p 0.5", "--top-p has no effect"),
    (Chat, "model gpt2 --offline", "--model gpt2: is not a folder here"),
    (Compare, "model a b", "--model takes two models"),
    (Compare, "model gpt2 --prompts pairs.jsonl --votes other.jsonl", "--prompts has no effect: --answers and --votes bring"),
    (Compare, "--answers pairs.jsonl", "--answers takes two files"),
    (Compare, "model --answers pairs.jsonl other.jsonl", "--answers stands in the place of two models"),
    (Compare, "model --votes other.jsonl", "--votes needs the two models' names"),
    (Compare, "model gpt2 --votes other.jsonl --reward lexicon:a", "--votes decides, and so would --reward"),
    (Compare, "model gpt2 --judge endpoint:http://localhost/v1#j --reward lexicon:a --output x", "--judge decides, and so would --reward"),
    (Compare, "model gpt2 --judge endpoint:http://localhost/v1#j", "--judge needs --output FOLDER"),
    *((Compare, f"model gpt2 {words}", f"{words.split()[0]} has no effect without --judge") for words in (
        "--question pairs.jsonl", "--judge-tokens 9", "--skip-bad", "--concurrency 2", "--retries 1", "--timeout 1", "--key-variable KEY",
        "--price-in 1", "--price-out 1")),
    (Compare, "model gpt2 --prompts pairs.jsonl --margin 1", "--margin has no effect without --reward"),
    (Compare, "model gpt2 --prompts pairs.jsonl --temperature 0 --k 2", "--k makes equal samples"),
    (Compare, "model gpt2 --prompts pairs.jsonl --temperature 0 --top-p 0.5", "--top-p has no effect"),
    (Compare, "--answers pairs.jsonl other.jsonl --k 2", "--k has no effect: nothing is sampled"),
    (Compare, "--answers pairs.jsonl other.jsonl --sample-tokens 2", "--sample-tokens has no effect: nothing is sampled"),
    (Compare, "--answers pairs.jsonl other.jsonl --temperature 0.5", "--temperature has no effect: nothing is sampled"),
    (Compare, "--answers pairs.jsonl other.jsonl --dry-run", "--dry-run has no effect: nothing is sampled"),
    (Evaluate, "--model model --data pairs.jsonl --sample-prompts 0 --k 2", "--k has no effect: --sample-prompts is 0"),
    (Evaluate, "--model model --data pairs.jsonl --sample-prompts 0 --sample-tokens 9", "--sample-tokens has no effect: --sample-prompts"),
    (Evaluate, "--model model --data pairs.jsonl --tokens 2", "--tokens is written to --output or --page: name one"),
    (Evaluate, "--model model --data pairs.jsonl --output a.html", "--output must end with .json"),
    (Evaluate, "--model model --data pairs.jsonl --page a.json", "--page must end with .html"),
    (Evaluate, "--model model --data pairs.jsonl --loss simpoo", "did you mean 'simpo'?"),
    (Evaluate, "--model model --data pairs.jsonl --reward model", "--reward must be"),
    (Rate, "", "--data must be given, for example:\n  preftune rate games.csv"),
    (Rate, "pairs.jsonl --cluster prompt", "--cluster has no effect on fisher intervals"),
    (Rate, "pairs.jsonl --draws 500", "--draws has no effect without --intervals bootstrap"),
    (Rate, "pairs.jsonl --seed 1 --intervals sandwich", "--seed has no effect without --intervals bootstrap"),
    (Rate, "pairs.jsonl --method davidson --ties half", "--ties has no effect: this --method models ties"),
    (Rate, "pairs.jsonl --method plackett-luce --ties half", "--ties half is a reading of games of two"),
    (Rate, "pairs.jsonl --ties efron", "--ties breslow and efron need --method plackett-luce"),
    (Rate, "pairs.jsonl --pairs", "--pairs makes dependent games of a ranking"),
    (Rate, "pairs.jsonl --pairs --intervals sandwich --method plackett-luce", "--pairs has no effect: plackett-luce reads rankings"),
    (Rate, "pairs.jsonl --compare a", "--compare takes two names"),
    (Rate, "pairs.jsonl --output board.png", "--output must end with .html or .svg"),
    (Rate, "pairs.jsonl --output pairs.jsonl", "--output must end with .html"),
    (Rate, "pairs.jsonl --json pairs.jsonl", "--json is also an input"),
    (Rate, "pairs.jsonl --anchor a", "--anchor must be NAME=VALUE"),
    (Rate, "pairs.jsonl --level 1", "--level must be a number above 0 and below 1"),
    (Report, "", "--run must be given"),
    (Report, "a b", "--run is given twice"),
    (Sft, "--model model --data pairs.jsonl --output out --from-scores all", "--from-scores has no effect without --preferred"),
    (Ppo, "--model model --data pairs.jsonl --output out", "--reward must be given"),
    (Ppo, f"{ROLL} --finish never", "--finish has no effect: of the data only prompts are read"),
    (Ppo, f"{ROLL} --patience 2", "--patience has no held-out loss to go by"),
    (Ppo, f"{ROLL} --publish best", "--publish best has no held-out loss"),
    (Ppo, f"{ROLL} --batch-size 8 --rollout-prompts 4", "--rollout-prompts must be at least --batch-size"),
    (Ppo, f"{ROLL} --advantage rloo --k 1", "--k must be at least 2: --advantage rloo"),
    (Ppo, f"{ROLL} --advantage rloo --no-whiten", "--whiten has no effect"),
    *((Ppo, f"{ROLL} --advantage rloo --{flag} {value}", f"--{flag} has no effect: there is a value model with --advantage gae only")
      for flag, value in (("discount", 0.9), ("lam", 1), ("value", "copy"), ("value-weight", 1), ("value-lr", 2), ("clip-value", 1))),
    (Ppo, f"{ROLL} --value reward", "--value reward begins as a reward model, and --reward is none: give --reward model:FOLDER"),
    (Ppo, f"{ROLL.replace('lexicon:pairs.jsonl', 'model:model')} --value reward --normalise-rewards",
     "--normalise-rewards changes the unit of rewards"),
    (Ppo, f"{ROLL} --importance-cap 0.5", "--importance-cap must be 0, which corrects nothing, or at least 1"),
    *((verb, f"{ROLL.replace('--model model', '--model endpoint:http://127.0.0.1:1/v1#m')}", "weights do not follow the policy")
      for verb in (Ppo, OnlineDpo)),
    (Ppo, f"{ROLL} --kl-horizon 100", "--kl-horizon has no effect without --kl-target"),
    (Ppo, f"{ROLL} --beta 0 --kl-target 2", "--kl-target has nothing to steer"),
    (Ppo, f"{ROLL} --advantage group --kl-target 2", "--kl-target steers the KL in the reward: give --kl reward"),
    (Ppo, f"{ROLL} --beta 0 --kl k3", "--kl has no effect: --beta is 0"),
    (Ppo, f"{ROLL} --temperature 0", "--temperature must be a number above 0"),
    (Ppo, f"{ROLL} --kl-coef 0.1", "did you mean '--beta'?"),
    (OnlineDpo, f"{ROLL} --from-scores all", "--from-scores has no effect: of the data only prompts are read"),
    (OnlineDpo, f"{ROLL} --k 1", "--k must be at least 2: pairs are made"),
    (OnlineDpo, f"{ROLL} --loss simpo --reference-update hard", "reads no reference"),
    (OnlineDpo, f"{ROLL} --reference-every 9", "--reference-every has no effect without"),
    (DataCheck, "", "--data must be given"),
    (DataCheck, "pairs.jsonl --eval-data pairs.jsonl", "--eval-data names a file of --data"),
    (DataCheck, "pairs.jsonl --max-length 9", "--max-length has no effect without --model"),
    (DataCheck, "pairs.jsonl --finish never", "--finish has no effect without --model"),
    (DataCheck, "pairs.jsonl --bos never", "--bos has no effect without --model"),
    (DataCheck, "pairs.jsonl --template plain", "--template has no effect without --model"),
    (DataCheck, "pairs.jsonl --control-tokens split", "--control-tokens has no effect without --model"),
    (DataShow, "--model model --data pairs.jsonl --row 0", "--row must be a whole number of at least 1"),
    (DataConvert, "--data pairs.jsonl --output pairs.jsonl", "--output is also an input"),
    (Demo, "--language fr", "--language must be one of en, zh"),
    (Demo, "--break x", "'x' is not an option"),
    (Env, "--verbose", "unknown option --verbose"),
    (Env, "x", "'x' is not an option"),
]


@pytest.mark.parametrize(("cls", "words", "fragment"), OTHER_VERBS, ids=[f"{row[0].__name__} {row[1]}" for row in OTHER_VERBS])
def test_other_verbs_refuse_too(here, cls, words, fragment):
    with pytest.raises(UsageError) as error:
        parse(words.split(), cls)
    assert fragment in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_the_tables_of_refusals_are_large_and_reach_every_contradiction():
    assert len(INVALID_WORDS) + len(OTHER_VERBS) >= 100
    told = " ".join(fragment for _, fragment in INVALID_WORDS) + " ".join(fragment for *_, fragment in OTHER_VERBS)
    for _, name, _, _ in CONTRADICTIONS:
        assert f"--{name.replace('_', '-')} " in told, f"the contradiction of {name} has no test"


@pytest.mark.parametrize(("words", "error", "fragment"), [
    (f"--model {'m' * 300} --data pairs.jsonl --output out", ModelError, "mmm: no such model folder"),
    (f"--model model --data {'m' * 300} --output out", DataError, "mmm: no such file"),
    ("--model gone/model.json --data pairs.jsonl --output out", ModelError, "gone/model.json: no such model folder"),
    ("--model ./modle --data pairs.jsonl --output out", ModelError, "./modle: no such model folder (did you mean 'model'?)"),
    ("--model runs/none --data pairs.jsonl --output out", ModelError, "runs/none: no such model folder"),
    ("--model model --data pair.jsonl --output out", DataError, "pair.jsonl: no such file (did you mean 'pairs.jsonl'?)"),
    ("--model model --data pairs.jsonl --eval-data gone.jsonl --output out", DataError, "gone.jsonl: no such file"),
])  # fmt: skip
def test_missing_inputs_are_told_before_anything_is_imported(here, words, error, fragment):
    with pytest.raises(error, match=re.escape(fragment)):
        parse(words.split(), Dpo)


# --- what is accepted -----------------------------------------------------------------------------------------------------


def test_words_become_typed_options(here):
    options = dpo("--beta", "1e-1", "--lr=2E-6", "--batch_size", "4", "--eval-data", "other.jsonl", "--skip-bad", "--no-report",
                  "--epochs", "3", "--allow", "leak", "equal", "--allow", "contradicting", "--template", "-1")  # fmt: skip
    assert (options.beta, options.lr, options.batch_size, options.skip_bad, options.report) == (0.1, 2e-6, 4, True, False)
    assert options.allow == ["leak", "equal", "contradicting"] and options.template == "-1" and options.epochs == 3
    assert dpo("--lr", "auto").lr == "auto" and dpo().lr == "auto"
    assert dpo("--eval-data", "pairs.jsonl", "--allow", "leak").eval_data == ["pairs.jsonl"]
    assert parse(["--resume", "runs/x"], Dpo) == Dpo(resume="runs/x")
    assert parse(["model"], Chat).model == ["model"] and parse(["--model", "model", "gpt2"], Chat).model == ["model", "gpt2"]
    assert parse(["runs/x", "--output=a.html"], Report) == Report(run="runs/x", output="a.html")
    assert parse(["--break", "--language", "zh"], Demo) == Demo(break_=True, language="zh")
    assert parse(["--model", "gpt2", "--data", "pairs.jsonl"], Logprobs).output == "-"


def test_objects_check_themselves():
    for wrong in ({"beta": -1}, {"seed": True}, {"seed": 1.0}, {"data": "x"}, {"lr": "1e-5"}, {"report": 1}, {"loss": None},
                  {"loss_arguments": {"beta": 0}}, {"loss_arguments": [1]}, {"holdout": float("nan")},
                  {"device": "cuda:0\n"}):  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Dpo(**wrong)
    assert Dpo(epochs=2).epochs == 2 and Dpo(beta=None).beta is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        Dpo().seed = 1


# --- YAML -----------------------------------------------------------------------------------------------------------------------

INVALID_YAML: list[tuple[str, str]] = [
    ("bta: 1", "f.yaml:1: unknown key 'bta' (did you mean 'beta'?)"),
    ("seed: 1\n\nlearning_rate: 1e-5", "f.yaml:3: unknown key 'learning_rate' (did you mean 'lr'?)"),
    ("beta: 0.1\nlr: auto\nbeta: 0.2", "f.yaml:3: 'beta' was already given on line 1"),
    ("batch-size: 1\nbatch_size: 2", "f.yaml:2: 'batch_size' was already given on line 1"),
    ("loss.beta: 1\nloss_arguments:\n  beta: 2", "f.yaml:3: 'loss.beta' was already given on line 1"),
    ("loss_arguments: {gamma: 1, gamma: 2}", "'loss.gamma' was already given on line 1"),
    ("beta: no", "f.yaml:1: beta must be a number above 0, not 'no'"),
    ("beta: 12:30", "not '12:30'"),
    ("seed: 12:30:00", "f.yaml:1: seed must be a whole number of at least 0, not '12:30:00'"),
    ("seed: 0x10", "not '0x10'"),
    ("seed: 3.0", "seed must be a whole number of at least 0, not '3.0'"),
    ("seed: null", "seed must be a whole number of at least 0, not null"),
    ("seed:", "not null"),
    ("seed: ~", "not null"),
    ("data: null", "data must be text, not null"),
    ("loss: null", "loss must be text, not null"),
    ("beta: [0.1]", "beta must be a number above 0, not a list"),
    ("seed: {a: 1}", "not a table"),
    ("beta: '0.1'", "beta must be a number above 0, not the text '0.1' (leave out the quotes)"),
    ("beta: .inf", "beta must be finite"),
    ("beta: -.INF", "beta must be finite"),
    ("beta: .nan", "beta must be finite"),
    ("beta: -0.1", "f.yaml:1: beta must be a number above 0, not -0.1"),
    ("skip_bad: yes", "skip_bad must be true or false, not 'yes'"),
    ("skip_bad: on", "skip_bad must be true or false, not 'on'"),
    ("skip_bad: off", "skip_bad must be true or false, not 'off'"),
    ("skip_bad: 1", "skip_bad must be true or false, not '1'"),
    ("skip_bad: 'true'", "skip_bad must be true or false, not the text 'true'"),
    ("data: [[a]]", "data must be text, not a list"),
    ("data: [a, null]", "data must be text, not null"),
    ("data: [a, a]", "data names 'a' twice"),
    ("allow: leek", "did you mean 'leak'?"),
    ("finish: maybe", "finish must be one of auto, always, never"),
    ("model: !!python/object/apply:os.system ['touch marker']", "model must be text, not a list"),
    ("model: !!python/object/apply:os.system touch", "has the tag '!!python/object/apply:os.system'; only plain values"),
    ("model: !!python/name:os.system", "only plain values are accepted"),
    ("data: !!python/tuple [a]", "data must be text, not a list"),
    ("seed: !mine 3", "has the tag '!mine'"),
    ("_component_: torch.optim.AdamW", "unknown key '_component_'"),
    ("env: {HOME: x}", "unknown key 'env'"),
    ("config: other.yaml", "unknown key 'config'"),
    ("<<: {seed: 1}", "unknown key '<<'"),
    ("x: &a {seed: 1}\ny: *a", "unknown key 'x'"),
    ("[1, 2]: 3", "a key must be the name of an option"),
    ("loss.beta: [1]", "loss.beta must be a number above 0, not a list"),
    ("loss_arguments: 3", "expected lines of 'option: value'"),
    ("loss_arguments: {tau: high}", "f.yaml:1: loss.tau must be a number above 0, not 'high'"),
    ("- seed", "f.yaml:1: expected lines of 'option: value'"),
    ("just text", "expected lines of 'option: value'"),
    ("seed: 1\n\tbeta: 2", "f.yaml:2: not valid YAML"),
    ("seed: [1", "not valid YAML"),
    ("seed: 1\n---\nseed: 2", "f.yaml:2: not valid YAML: but found another document"),
    ("seed: *gone", "f.yaml:1: not valid YAML: found undefined alias 'gone'"),
    ("seed: \x01", "f.yaml: not valid YAML"),
    ("seed: " + "[" * 5000, "f.yaml"),
]


@pytest.mark.parametrize(("text", "fragment"), INVALID_YAML, ids=[text[:40] for text, _ in INVALID_YAML])
def test_invalid_yaml_is_refused(here, text, fragment):
    with pytest.raises(UsageError) as error:
        load_yaml(text, "f.yaml", Dpo)
    assert fragment in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert not Path("marker").exists()


def test_yaml_is_typed_by_the_options():
    text = "beta: 1e-5\nlr: 1\nseed: 007\nmodel: no\ndata: 2024-01-01\nformat: 12:30\nskip-bad: true\noutput: '1'\n"
    text += "max_length: null\nlr: auto\n"
    with pytest.raises(UsageError, match=r"f.yaml:10: 'lr' was already given on line 2"):
        load_yaml(text, "f.yaml", Dpo)
    read = load_yaml(text.replace("lr: auto\n", "loss.gamma: .5\neval_data: [a, 'b c']\n"), "f.yaml", Dpo)
    assert read == {"beta": 1e-5, "lr": 1.0, "seed": 7, "model": "no", "data": ["2024-01-01"], "format": "12:30",
                    "skip_bad": True, "output": "1", "max_length": None, "loss_arguments": {"gamma": 0.5},
                    "eval_data": ["a", "b c"]}  # fmt: skip
    assert load_yaml("", "f.yaml", Dpo) == {} == load_yaml("# nothing\n", "f.yaml", Dpo)
    assert load_yaml("break: true", "f.yaml", Demo) == {"break_": True}


def test_flags_override_yaml_and_errors_name_its_line(here):
    text = "\ufeffmodel: model\ndata: pairs.jsonl\noutput: out\nloss: simpo\nloss_arguments:\n  gamma: 0.5\n"
    Path("run.yaml").write_text(text, encoding="utf-8")
    assert parse(["--config", "run.yaml"], Dpo).loss_arguments == {"gamma": 0.5}
    options = parse(["--output", "elsewhere", "--config=run.yaml", "--loss.beta", "3"], Dpo)
    assert options.output == "elsewhere" and loss_terms(options) == [(1.0, "simpo", {"beta": 3.0, "gamma": 0.5})]
    assert parse(["--config", "run.yaml", "--loss.gamma", "0.25"], Dpo).loss_arguments == {"gamma": 0.25}
    with pytest.raises(UsageError, match=r"^run.yaml:6: loss.gamma: the loss 'hinge' takes no 'gamma'; it takes --loss.beta$"):
        parse(["--config", "run.yaml", "--loss", "hinge"], Dpo)
    Path("bad.yaml").write_bytes("model: caf\u00e9".encode("latin-1"))
    with pytest.raises(UsageError, match=r"--config bad.yaml: not UTF-8 text at byte 10"):
        parse(["--config", "bad.yaml"], Dpo)


def test_the_file_of_a_run_reads_back_whatever_else_was_given(here):
    """The resolved file lists every option, so a default in it contradicts nothing."""
    for words in ("", "--eval-data other.jsonl", "--warmup 1", "--eval-prompts 0", "--loss ipo-sum+0.1*nll --loss.tau 1"):
        options = dpo(*words.split())
        Path("config.yaml").write_text(resolved_yaml(options), encoding="utf-8")
        assert parse(["--config", "config.yaml"], Dpo) == options == build(Dpo, load_config("config.yaml", Dpo))
    with pytest.raises(UsageError, match=r"config.yaml:\d+: \w+ cannot be given with --resume"):
        parse(["--config", "config.yaml", "--resume", "runs/x"], Dpo)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
HARD = ["no", "null", "~", "1e-5", "12:30", "0x1", "- a", "a: b", "# x", "'", '"', "!!int 3", " a ", "<<", "*a", "&a", "%a", "@a",
        "\x85", "\u2028", "\ufeff", "\x7f", "a\r\nb", "\ufffe"]  # fmt: skip
hard_texts = st.one_of(texts, st.sampled_from(HARD))


finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)


def values_of(spec: config.Spec) -> st.SearchStrategy:
    low, high = spec.low, spec.high
    numbers = st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min=spec.open_low, exclude_max=spec.open_high)
    by_kind = {
        "switch": st.booleans(),
        "whole": st.integers(int(low or 0), 10**12),
        "number": numbers,
        "text": hard_texts,
        "texts": st.lists(st.sampled_from(spec.choices) if spec.choices else hard_texts, unique=True, max_size=3),
        "numbers": st.dictionaries(names.filter(lambda name: name not in LOSS_BOUNDS), finite, max_size=3),
    }
    value = by_kind[spec.kind]
    if spec.choices and spec.kind != "texts":
        value = st.one_of(st.sampled_from(spec.choices), value) if spec.kind == "number" else st.sampled_from(spec.choices)
    if spec.pattern:
        known = {"key_variable": ["KEY_1"], "judge": ["endpoint:http://h/v1#a b"]}
        known |= {"device": ["cuda:3", "cpu"], "anchor": ["a=b=-1e3", "名 =.5"]}
        value = st.sampled_from(known.get(spec.name, ["lexicon:a b.txt", "python:x.py:f"]))
        value = st.lists(value, unique=True, max_size=2) if spec.kind == "texts" else value
    return st.none() | value if spec.optional else value


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_resolved_yaml_round_trips(data):
    cls = data.draw(st.sampled_from(CLASSES))
    options = cls(**{spec.name: data.draw(values_of(spec), label=spec.name) for spec in specs(cls)})
    text = resolved_yaml(options)
    assert cls(**load_yaml(text.encode().decode(), "f.yaml", cls)) == options
    assert resolved_yaml(cls(**load_yaml(text, "f.yaml", cls))) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.sampled_from([Dpo, Chat, Demo]))
def test_any_text_is_read_or_refused(text, cls):
    """Nothing but a PreftuneError ever comes out of a file."""
    try:
        load_yaml(text, "f.yaml", cls)
    except PreftuneError as error:
        assert str(error).startswith("f.yaml") and len(str(error).splitlines()) <= 3


ODD_WORDS = ["--beta", "--data", "--loss.x", "--config", "--", "-", "--no-report", "--lr=", "=", "--="]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=8) | st.sampled_from(ODD_WORDS), max_size=5), st.sampled_from([Dpo, Chat, Report, Env]))
def test_any_words_are_read_or_refused(words, cls):
    try:
        parse(words, cls)
    except PreftuneError as error:
        assert len(str(error).split("\n")) <= 3 or any("\n" in word for word in words)


# --- losses read as text ---------------------------------------------------------------------------------------------------


def test_losses_read_as_text_are_the_losses_that_run():
    from preftune.losses import LOSSES, arguments

    assert list(loss_facts()) == list(LOSSES) and len(LOSSES) >= 10
    for name, facts in loss_facts().items():
        loss = LOSSES[name]
        assert facts.arguments == arguments(name), name
        assert (facts.kind, facts.reference, facts.soft, facts.source) == (loss.kind, loss.reference, loss.soft, loss.source)
        assert facts.formula == loss.function.__doc__.splitlines()[0].strip()
    known = {argument for facts in loss_facts().values() for argument in facts.arguments}
    assert set(LOSS_BOUNDS) <= known
    targets = {"verdicts": "labels", "grades": "scores", "classes": "classes"}
    for name, facts in loss_facts().items():  # the defaults pass our own bounds
        if facts.scalar == "only":
            options = Reward(loss=name, loss_arguments=facts.arguments, target=targets.get(facts.kind, "preferences"))
            assert scored_terms(options) == [(1.0, name, facts.arguments)]
        else:
            assert loss_terms(Dpo(loss=name, loss_arguments=facts.arguments)) == [(1.0, name, facts.arguments)]


def test_weighted_sums():
    assert parse_loss("sigmoid+0.1*nll") == [(1.0, "sigmoid"), (0.1, "nll")] == parse_loss(" 1*sigmoid + 1e-1 * nll ")
    terms = loss_terms(Dpo(loss="sigmoid+2*hinge+nll", beta=0.3))
    assert terms == [(1.0, "sigmoid", {"beta": 0.3}), (2.0, "hinge", {"beta": 0.3}), (1.0, "nll", {})]
    assert loss_terms(Dpo(loss="simpo", loss_arguments={"gamma": 0})) == [(1.0, "simpo", {"beta": 2.0, "gamma": 0})]
    loss_terms(Dpo(loss="sigmoid+nll", label_smoothing=0.1))


# --- names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "./x", "../x", "/x/y", "~/x", "a/b/c", "a/", "runs/x", "runs/x/model", "x.json", "a/b.safetensors", ".", "..", "C:\\x",
    "a\\b", "a b", "model/x", "pairs.jsonl", "", "-x", "a//b", "hub:x", "https://a/b",
])  # fmt: skip
def test_paths_are_never_hub_names(here, text):
    assert is_path_like(text)


@pytest.mark.parametrize("text", ["gpt2", "org/name", "Qwen/Qwen2.5-0.5B-Instruct", "a/b_c.d-e", "01-ai/Yi-6B"])
def test_hub_names_are_not_paths(here, text):
    assert not is_path_like(text)


# --- the tables themselves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_is_documented_and_its_default_passes(cls):
    cls()
    for field in dataclasses.fields(cls):
        assert len(field.metadata["help"]) > 4 and field.metadata["group"] in GROUPS, field.name
        assert not field.metadata["help"].endswith(".")
    assert len({spec.flag for spec in specs(cls)}) == len(dataclasses.fields(cls)) == len(specs(cls))
    assert cls.EXAMPLE.startswith(f"preftune {next(name for name, verb in VERBS.items() if verb.options is cls)}")
    assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "(")


def test_every_hint_leads_somewhere():
    names = {spec.name for cls in CLASSES for spec in specs(cls)}
    assert set(ALSO_CALLED.values()) <= names
    for cls in CLASSES:  # what one verb calls data another may call prompts, none has both
        assert not [other for other, ours in ALSO_CALLED.items() if {other, ours} <= {spec.name for spec in specs(cls)}]
    assert {re.match(r"[\w-]+", hint)[0] for hint in LOSS_ALSO_CALLED.values()} <= set(loss_facts())


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not Env], ids=lambda cls: cls.__name__)
def test_the_example_of_every_verb_parses(here, cls):
    for name in ("MODEL", "runs/first"):
        Path(name).mkdir(parents=True)
    for name in ("prompts.txt", "pairs.csv", "games.csv", "held-out.jsonl", "samples.jsonl", "scored.jsonl"):
        Path(name).write_text("x")
    parse(split_verb(cls.EXAMPLE.split()[1:])[1], cls)
