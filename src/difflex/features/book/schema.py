"""The tables of a book; docs/books.md explains them."""

__all__ = ["APPLICATION", "FORMAT", "INDEXES", "TABLES"]

FORMAT = 2
"""Kept as `PRAGMA user_version`. Books of format 1 knew no default strengths."""
APPLICATION = 0x64666C78
"""Kept as `PRAGMA application_id`: the letters dflx. Other SQLite files are told apart by it."""

TABLES = """
CREATE TABLE about (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL                     -- JSON
) WITHOUT ROWID;

CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    file TEXT NOT NULL UNIQUE,              -- in the study's folder `images`
    width INTEGER NOT NULL,
    height INTEGER NOT NULL
);

CREATE TABLE shots (
    id INTEGER PRIMARY KEY,
    image INTEGER NOT NULL REFERENCES images (id),
    split TEXT NOT NULL CHECK (split IN ('train', 'held-out')),
    shot TEXT NOT NULL                      -- the record Shot as JSON
);

CREATE TABLE features (
    feature INTEGER PRIMARY KEY,
    fired INTEGER NOT NULL,                 -- tokens at which it fires
    shots INTEGER NOT NULL,                 -- shots in which it fires
    density REAL NOT NULL,                  -- share of tokens at which it fires
    peak REAL NOT NULL,                     -- its largest value; 0 if it never fires
    mean REAL NOT NULL,                     -- where it fires
    negative_share REAL NOT NULL,           -- share of tokens at which its code is negative
    negative_peak REAL NOT NULL,            -- its most negative value, 0 if it has none
    area REAL,                              -- NULL: it never fires, or its tokens have no place
    spread REAL,
    concentration REAL,
    border REAL,
    position REAL,
    coverage REAL,
    strength REAL,                          -- in peaks, where none is named; NULL: not known
    histogram TEXT NOT NULL,                -- JSON: first bin, then the counts
    activity TEXT NOT NULL                  -- JSON: density at each of the timesteps in `about`
);

CREATE TABLE examples (
    id INTEGER PRIMARY KEY,
    feature INTEGER NOT NULL REFERENCES features (feature),
    kind TEXT NOT NULL CHECK (kind IN ('top', 'quantile', 'silent')),
    split TEXT NOT NULL CHECK (split IN ('train', 'held-out')),
    rank INTEGER NOT NULL,                  -- from 0, among those of its feature, kind and split
    shot INTEGER NOT NULL REFERENCES shots (id),
    peak REAL NOT NULL,                     -- its largest value in this shot
    quantile REAL,                          -- share of the shots in which it fires whose peak is lower; NULL unless sampled
    map BLOB NOT NULL                       -- n tokens, then n values in 1/65535 of the peak, both as little-endian uint16
);

CREATE TABLE neighbours (
    feature INTEGER NOT NULL REFERENCES features (feature),
    kind TEXT NOT NULL CHECK (kind IN ('firing', 'direction')),
    rank INTEGER NOT NULL,
    other INTEGER NOT NULL REFERENCES features (feature),
    value REAL NOT NULL,
    PRIMARY KEY (feature, kind, rank)
) WITHOUT ROWID;

CREATE TABLE patches (
    feature INTEGER PRIMARY KEY REFERENCES features (feature),
    token INTEGER NOT NULL,
    image INTEGER REFERENCES images (id),  -- NULL where it could not be drawn again
    shot TEXT NOT NULL                      -- the record Shot as JSON
);

CREATE TABLE explanations (
    id INTEGER PRIMARY KEY,
    feature INTEGER NOT NULL REFERENCES features (feature),
    backend TEXT NOT NULL,
    protocol TEXT NOT NULL,
    text TEXT NOT NULL,                     -- what all the images share, in words
    descriptions TEXT NOT NULL,             -- JSON: a list, what each image shows
    state TEXT NOT NULL CHECK (state IN ('done', 'failed')),
    reason TEXT NOT NULL DEFAULT '',        -- why it failed
    UNIQUE (feature, backend, protocol)
);

CREATE TABLE judgements (
    id INTEGER PRIMARY KEY,
    explanation INTEGER NOT NULL REFERENCES explanations (id) ON DELETE CASCADE,
    example INTEGER NOT NULL REFERENCES examples (id),
    wanted INTEGER NOT NULL CHECK (wanted IN (0, 1)),
    score REAL NOT NULL                     -- between 0 and 1
);

CREATE TABLE scores (
    explanation INTEGER NOT NULL REFERENCES explanations (id) ON DELETE CASCADE,
    measure TEXT NOT NULL,                  -- accuracy, auroc, intruder ...
    value REAL NOT NULL,
    low REAL,
    high REAL,
    count INTEGER NOT NULL,                 -- judgements behind it
    PRIMARY KEY (explanation, measure)
) WITHOUT ROWID;

CREATE TABLE usage (
    id INTEGER PRIMARY KEY,
    explanation INTEGER REFERENCES explanations (id) ON DELETE SET NULL,
    backend TEXT NOT NULL,
    role TEXT NOT NULL,                     -- who was asked: explainer or judge
    asked INTEGER NOT NULL,                 -- calls
    tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL,
    cost REAL,                              -- in dollars; NULL where nobody says
    seconds REAL NOT NULL
);
"""

INDEXES = """
CREATE UNIQUE INDEX examples_of_a_feature ON examples (feature, kind, split, rank);
CREATE INDEX examples_of_a_shot ON examples (shot);
CREATE INDEX features_by_density ON features (density);
CREATE INDEX features_by_peak ON features (peak);
CREATE INDEX shots_of_a_image ON shots (image);
CREATE INDEX judgements_of_an_explanation ON judgements (explanation);
CREATE INDEX scores_by_measure ON scores (measure, value);
"""
