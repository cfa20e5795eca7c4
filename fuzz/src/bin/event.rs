//! libFuzzer's program for [`fence_fuzz::event`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fence_fuzz::event::check(bytes));
