//! libFuzzer's program for [`fence_fuzz::hosts`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fence_fuzz::hosts::check(bytes));
