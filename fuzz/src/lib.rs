//! Checks for any bytes from outside, as functions that panic if something does not hold.
//!
//! Each has a folder of inputs in `corpus/`. Plain `cargo test` replays them and tries mutations of
//! them (`tests/corpus.rs`). `cargo xtask fuzz` gives the same functions to libFuzzer, which looks
//! for new paths. An input that breaks something becomes a file in `corpus/`, with a described case
//! beside the mended code.

pub mod config;
pub mod event;
pub mod hosts;
pub mod line;
pub mod request;
pub mod stream;

/// A function that takes any bytes and panics if something does not hold.
pub type Target = fn(&[u8]);

/// Every target with the name of its folder in `corpus/`.
pub const TARGETS: [(&str, Target); 6] = [
    ("config", config::check),
    ("request", request::check),
    ("stream", stream::check),
    ("event", event::check),
    ("line", line::check),
    ("hosts", hosts::check),
];

/// Writes the table of bad configurations into the folder that `FENCE_FUZZ_SEEDS` names, a file for
/// each row: libFuzzer's inputs beside `corpus/config`.
///
/// # Panics
/// If the folder cannot be written to.
pub fn write_seeds() {
    let Some(folder) = std::env::var_os("FENCE_FUZZ_SEEDS").map(std::path::PathBuf::from) else { return };
    for case in fence_config::cases::cases() {
        let file = folder.join(case.title.replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
        let written = std::fs::write(&file, case.bytes());
        assert!(written.is_ok(), "{}: {written:?}", file.display());
    }
}
