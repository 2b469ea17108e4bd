import json, math, traceback, copy
import pytest
from pathlib import Path
from omegaconf import OmegaConf
from vit_attn.report.runs import read_runs
from vit_attn.report.compare import compare
from vit_attn.report.summary import summarize, write_csv, agreement, by_layer
from vit_attn.errors import UserError

def go(folder, tmp_path):
    c = compare(read_runs([folder]))
    rows = summarize(c); write_csv(c, tmp_path/"r.csv")
    for g in c.groups: agreement(g); by_layer(g, "zeros")
    return c

@pytest.mark.parametrize("opt", [{"alpha":"1.3"},{"alpha":[1.3]},{"alpha":{"a":1}},{"window":"4"},{"window":[4]},{"nonsense":1},{"implementation":3},{"implementation":"fast"},{"causal":"yes"},{"alpha":float("nan")},{"alpha":5}])
def test_opt(make_run, tmp_path, opt):
    make_run(seed=1); r = make_run(attention="entmax+strided", seed=1)
    cfg = OmegaConf.load(r/"config.yaml")
    cfg.model.attention_options.update(opt); OmegaConf.save(cfg, r/"config.yaml")
    c = go(tmp_path/"experiment", tmp_path); print([g.label for g in c.groups])

@pytest.mark.parametrize("change", [
  {"cost": {"flops": 10**400}}, {"attention_statistics": {"²": {"zeros": 1}}}, {"environment": 3}, {"speed": {"device": {"a":1}}},
  {"test": {"acc": float("inf")}}, {"test":{"confusion": [[10**400]]}}, {"test":{"confusion":[["a"]]}}, {"seed": True}, {"epochs": [1]}, {"cost": {"entries": ["a", None]}},
  {"attention_statistics": {"0": {"zeros": float("nan")}}}, {"explanations": {"methods": {"rollout": {"deletion_auc": "x"}}}}, {"environment": {"cpu_count": 10**400}}])
def test_results(make_run, tmp_path, change):
    make_run(seed=1); r = make_run(attention="strided", seed=1)
    p = r/"results/metrics.json"; d = json.loads(p.read_text())
    for k, v in change.items(): d[k] = {**d[k], **v} if isinstance(v, dict) and isinstance(d.get(k), dict) else v
    p.write_text(json.dumps(d)); c = go(tmp_path/"experiment", tmp_path); print(c.warnings)

def test_pathlike(make_run, tmp_path):
    make_run(seed=1)
    r = make_run(attention="strided", seed=1)
    cfg = OmegaConf.load(r/"config.yaml"); cfg.callbacks = 3; cfg.trainer=None; cfg.data=[1,{"a":2}]; OmegaConf.save(cfg, r/"config.yaml")
    c = go(tmp_path/"experiment", tmp_path); print(c.warnings, [g.label for g in c.groups])
@pytest.mark.parametrize("b", ["full","softmax+full","strided","stridded","", "[strided]", "entmax"])
def test_base(make_run, tmp_path, b):
    for s in (1,2):
        make_run(seed=s); make_run(attention="strided", seed=s)
        make_run(attention="entmax", options={"alpha":1.3}, seed=s); make_run(attention="entmax", options={"alpha":1.7}, seed=s)
    try: print(repr(b), compare(read_runs([tmp_path/"experiment"]), baseline=b).baseline)
    except UserError as e: print(repr(b), "UserError", e)
