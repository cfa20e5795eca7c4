//! The daemon and the stock client in network namespaces, with libvirt's in-process
//! `test:///default` and its one domain `test`.
//!
//! With `FENCE_LAB_SERVER=stock` the tests in [`operations`] run against Debian's fence_virtd. So
//! they demand only what fence_virtd does. All other tests concern our daemon alone.

mod across;
mod alone;
mod attacks;
mod bad_requests;
mod bench;
mod bystanders;
mod configure;
mod cpg;
mod doctor;
mod effects;
mod group_keys;
mod history;
mod inspect;
mod interfaces;
mod lab;
mod lateness;
mod lifecycle;
mod listeners;
mod lists;
mod metrics;
mod misbehaviour;
mod operations;
mod rate_limit;
mod refusals;
mod reload;
mod rotation;
mod serial;
mod settings;
mod startup;
mod tcp;
mod three_ways;
