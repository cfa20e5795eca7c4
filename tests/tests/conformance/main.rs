//! The conformance suite: the same scripted requests to Debian's fence_virtd and to fence-daemon,
//! one after the other. Whatever a client can see has to be the same, except where
//! `docs/reference/compatibility.md` lists a difference: then exactly that difference.
//!
//! Each scene is a test of its own (`cargo test --test conformance -- matrix`); the summary after
//! all of them also fails where a listed difference did not occur.

mod copies;
mod digests;
mod forms;
mod groups;
mod machines;
mod matrix;
mod report;
mod scene;
mod starts;
mod talk;
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

/// A part of the suite, and what came out of it.
type Part = (String, Box<dyn Fn() -> Result<Vec<Compared>> + Send>);

/// How many scenes are played at once: most of them wait most of the time.
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
    ]
    .into_iter()
    .flatten()
    .collect();
    let scenes = scenes.into_iter().map(|scene| -> Part { (scene.name.clone(), Box::new(move || scene.play())) });
    scenes.chain([("starts".to_owned(), Box::new(starts::play) as _)]).collect()
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
        // Nobody who could not read this would read an error about it either.
        let _ = std::io::stdout().write_all(summary.told().as_bytes());
    }
    let unseen = summary.unseen(&listed);
    if complete && !conclusion.has_failed() && !unseen.is_empty() {
        return fail(&format!("{} lists what did not occur: {}", differences::DOCUMENT, unseen.join(", ")));
    }
    conclusion.exit_code()
}

fn fail(why: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "conformance: {why}");
    ExitCode::FAILURE
}
