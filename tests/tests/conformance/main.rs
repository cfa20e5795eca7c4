//! The conformance suite sends the same scripted requests to Debian's fence_virtd and to
//! fence-daemon, one after the other. All that a client can see must be the same, except for the
//! differences that `docs/reference/compatibility.md` lists. Those must occur exactly as listed.
//!
//! Each scene is a test of its own (`cargo test --test conformance -- matrix`). The summary at the
//! end also fails if a listed difference did not occur.

mod copies;
mod digests;
mod forms;
mod groups;
mod machines;
mod matrix;
mod report;
mod scene;
mod serial;
mod starts;
mod talk;
mod tcp;
mod uris;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use fence_common::sync::lock;
use fence_lab::{differences, tools};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::report::{Compared, Summary};
use crate::scene::Scene;

/// A part of the suite, and its results.
type Part = (String, Box<dyn Fn() -> Result<Vec<Compared>> + Send>);

/// The number of scenes that run at once; most of them mostly wait.
const AT_ONCE: usize = 4;

fn parts() -> Vec<Part> {
    let scenes: Vec<Scene> = [
        matrix::scenes(),
        digests::scenes(),
        copies::scenes(),
        forms::scenes(),
        machines::scenes(),
        uris::scenes(),
        groups::scenes(),
        tcp::scenes(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let scenes = scenes.into_iter().map(|scene| -> Part { (scene.name.clone(), Box::new(move || scene.play())) });
    let others: [Part; 2] =
        [("starts".to_owned(), Box::new(starts::play)), ("serial".to_owned(), Box::new(serial::play))];
    scenes.chain(others).collect()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(AT_ONCE));
    let listed = match differences::read(&tools::workspace()) {
        Ok(listed) => Arc::new(listed),
        Err(error) => return fail(&format!("{error:#}")),
    };
    let summary: Arc<Mutex<Summary>> = Arc::default();
    let trials = parts().into_iter().map(|(name, play)| {
        let (summary, listed) = (Arc::clone(&summary), Arc::clone(&listed));
        Trial::test(name, move || {
            let compared = play().map_err(|error| Failed::from(format!("{error:#}")))?;
            lock(&summary).add(&compared);
            report::failures(&compared, &listed).map_or(Ok(()), |failures| Err(failures.into()))
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    let complete = conclusion.num_filtered_out == 0 && !arguments.list;
    let summary = lock(&summary);
    if !arguments.list {
        // If standard error is broken, no error about it can be shown either.
        let _ = std::io::stdout().write_all(summary.told().as_bytes());
    }
    let unseen = summary.unseen(&listed);
    if complete && !conclusion.has_failed() && !unseen.is_empty() {
        return fail(&format!("{} lists differences that did not occur: {}", differences::DOCUMENT, unseen.join(", ")));
    }
    conclusion.exit_code()
}

fn fail(why: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "conformance: {why}");
    ExitCode::FAILURE
}
