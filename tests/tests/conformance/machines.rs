//! Real machines under a real libvirtd: fewer than the test driver's domains, for cases that need
//! them.

use std::time::Duration;

use fence_common::wire::Op;
use fence_lab::testdriver::State;

use crate::scene::{Case, Expected, Scene};
use crate::talk;

const STATES: [Option<State>; 4] = [Some(State::Running), Some(State::Paused), Some(State::ShutOff), None];

/// The expected reply and state.
fn promised(op: Op, state: Option<State>) -> (u8, &'static str) {
    let is = state.map_or("unknown", State::name);
    match (op, state) {
        (Op::Status, None) => (2, is),
        (_, None) => (1, is),
        (Op::Status, Some(State::ShutOff)) => (2, is),
        (Op::Off, Some(_)) => (0, "off"),
        (Op::On, Some(State::ShutOff)) => (0, "running"),
        (Op::Reboot, Some(State::ShutOff)) => (0, "off"),
        (Op::Reboot, Some(_)) => (0, "running"),
        (_, Some(_)) => (0, is),
    }
}

/// Every operation on machines in every state.
fn operations() -> Scene {
    let (mut cases, mut machines) = (Vec::new(), Vec::new());
    for op in [Op::Off, Op::Reboot, Op::On, Op::Status] {
        for state in STATES {
            let name = format!("{}-{}", op.name(), state.map_or("unknown", State::name));
            let (reply, after) = promised(op, state);
            let expected = Expected::both(format!("{}, then {after}", talk::reply(reply)));
            let domain = name.clone();
            let case =
                Case::new(name.clone(), expected, move |stage, watched| talk::asked(stage, 1, watched, op, &domain));
            cases.push(case.and_state_of(name.clone()));
            machines.extend(state.map(|state| (name, state)));
        }
    }
    Scene { machines, ..Scene::new("machines", Vec::new(), cases) }
}

/// libvirtd dies, and the machine lives.
fn libvirtd_gone() -> Scene {
    const NAME: &str = "victim";
    let ask = |stage: &_, watched: &mut _, op| talk::asked(stage, 1, watched, op, NAME);
    let words = |reply| format!("status before: reply 0, monitor in the end: reply {reply}");
    let expected = Expected::differ("monitor", words(0), words(1));
    let case = Case::new("monitor when libvirtd is gone", expected, move |stage, watched| {
        let before = ask(stage, watched, Op::Status)?;
        stage.kill_libvirtd()?;
        let mut after = ask(stage, watched, Op::DevStatus)?;
        // The server notices the end of the connection a moment later.
        for _ in 0..10 {
            if after != talk::reply(0) {
                break;
            }
            std::thread::sleep(Duration::from_millis(300));
            after = ask(stage, watched, Op::DevStatus)?;
        }
        Ok(format!("status before: {before}, monitor in the end: {after}"))
    });
    Scene { machines: vec![(NAME.to_owned(), State::Running)], ..Scene::new("libvirtd-gone", Vec::new(), vec![case]) }
}

pub(crate) fn scenes() -> Vec<Scene> {
    vec![operations(), libvirtd_gone()]
}
