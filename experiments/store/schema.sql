-- The store: one file a study. PRAGMA user_version guards it; see store.h.
CREATE TABLE sweep (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, json TEXT NOT NULL, created TEXT NOT NULL,
  UNIQUE (name, json)) STRICT;

-- One fully resolved trial. key = hash of spec, model fingerprint, data fingerprints.
CREATE TABLE trial (
  key TEXT PRIMARY KEY, spec TEXT NOT NULL, model_hash TEXT NOT NULL, data_hash TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('planned', 'running', 'done', 'failed', 'out_of_memory', 'interrupted')),
  reason TEXT NOT NULL DEFAULT '') STRICT;

-- Which trials a sweep names, in its order, with its labels ({"method": "LoRA", "seed": "1"}).
CREATE TABLE sweep_trial (
  sweep INTEGER NOT NULL REFERENCES sweep (id), position INTEGER NOT NULL,
  trial TEXT NOT NULL REFERENCES trial (key), label TEXT NOT NULL, labels TEXT NOT NULL,
  PRIMARY KEY (sweep, position)) STRICT;

-- One try at a trial. environment: JSON (host, device, cpu, build, revision, dirty, command line).
CREATE TABLE attempt (
  id INTEGER PRIMARY KEY, trial TEXT NOT NULL REFERENCES trial (key), started TEXT NOT NULL, ended TEXT,
  outcome TEXT NOT NULL DEFAULT 'running', message TEXT NOT NULL DEFAULT '', host TEXT NOT NULL,
  pid INTEGER NOT NULL, device TEXT NOT NULL, environment TEXT NOT NULL) STRICT;
CREATE INDEX attempt_of_trial ON attempt (trial);

CREATE TABLE step (
  attempt INTEGER NOT NULL REFERENCES attempt (id), step INTEGER NOT NULL, epoch REAL NOT NULL,
  loss REAL, aux_loss REAL NOT NULL, lr REAL NOT NULL, grad_norm REAL, entropy REAL NOT NULL,
  tokens INTEGER NOT NULL, ms REAL NOT NULL, PRIMARY KEY (attempt, step)) STRICT, WITHOUT ROWID;

-- value and stderr in [0, 1]. base_value: the untrained base model's, majority: the commonest answer's rate.
CREATE TABLE score (
  attempt INTEGER NOT NULL REFERENCES attempt (id), suite TEXT NOT NULL, protocol TEXT NOT NULL,
  metric TEXT NOT NULL, value REAL NOT NULL, stderr REAL, n INTEGER NOT NULL, majority REAL NOT NULL,
  chance REAL NOT NULL, truncated INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (attempt, suite, protocol, metric)) STRICT, WITHOUT ROWID;

-- Every answer. log_probs: JSON array, one a choice; choice and gold are indices.
CREATE TABLE answer (
  attempt INTEGER NOT NULL REFERENCES attempt (id), suite TEXT NOT NULL, protocol TEXT NOT NULL,
  item TEXT NOT NULL, choice INTEGER NOT NULL, gold INTEGER NOT NULL, log_probs TEXT NOT NULL,
  PRIMARY KEY (attempt, suite, protocol, item)) STRICT, WITHOUT ROWID;

CREATE TABLE expert_load (
  attempt INTEGER NOT NULL REFERENCES attempt (id), phase TEXT NOT NULL, layer INTEGER NOT NULL,
  expert INTEGER NOT NULL, share REAL NOT NULL, PRIMARY KEY (attempt, phase, layer, expert)) STRICT, WITHOUT ROWID;

-- name: train_tokens_per_s, eval_tokens_per_s, train_ms_per_token, planned_peak_bytes, measured_peak_bytes,
-- trainable_parameters, base_parameters, train_seconds, eval_seconds, ...; unit: "tokens/s", "ms/token", "B", "1", "s"
CREATE TABLE measurement (
  attempt INTEGER NOT NULL REFERENCES attempt (id), name TEXT NOT NULL, value REAL NOT NULL, unit TEXT NOT NULL,
  PRIMARY KEY (attempt, name)) STRICT, WITHOUT ROWID;

-- The last attempt that finished each trial, under each sweep's own labels: what the tables read.
CREATE VIEW result AS
  SELECT s.sweep, s.position, s.label, s.labels, t.key AS trial, t.spec, t.status, t.reason, t.model_hash,
         (SELECT max(a.id) FROM attempt a WHERE a.trial = t.key AND a.outcome = 'done') AS attempt
  FROM sweep_trial s JOIN trial t ON t.key = s.trial;
