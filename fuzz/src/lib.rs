//! Checks for any bytes from outside, as functions that panic if something does not hold.
//!
//! Each has a folder of inputs in `corpus/`. Plain `cargo test` replays them and tries mutations of
//! them (`tests/corpus.rs`). `cargo xtask fuzz` gives the same functions to libFuzzer, which looks
//! for new paths. An input that breaks something becomes a file in `corpus/`, with a described case
//! beside the mended code.

pub mod config;
pub mod event;
pub mod request;

/// A function that takes any bytes and panics if something does not hold.
pub type Target = fn(&[u8]);

/// Every target with the name of its folder in `corpus/`.
pub const TARGETS: [(&str, Target); 3] =
    [("config", config::check), ("request", request::check), ("event", event::check)];
