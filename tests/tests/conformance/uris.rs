//! Several libvirt URIs in one configuration.

use std::time::Duration;

use anyhow::Result;
use fence_common::wire::Op;
use fence_lab::client::Client;
use fence_lab::peer::Peer;
use fence_lab::testdriver::{State, TestDomain, node, uuid};

use crate::scene::{Case, Expected, Scene, Stage};
use crate::talk::{self, HostList};

/// A domain's state at the first and at the second URI; `None` where it is unknown.
const DOMAINS: [(&str, Option<State>, Option<State>); 9] = [
    ("only-first-running", Some(State::Running), None),
    ("only-first-off", Some(State::ShutOff), None),
    ("only-second-running", None, Some(State::Running)),
    ("only-second-off", None, Some(State::ShutOff)),
    ("running-and-off", Some(State::Running), Some(State::ShutOff)),
    ("off-and-running", Some(State::ShutOff), Some(State::Running)),
    ("both-running", Some(State::Running), Some(State::Running)),
    ("both-off", Some(State::ShutOff), Some(State::ShutOff)),
    ("nobody", None, None),
];

/// Domains of the first URI, or of the second, for one operation.
fn domains(first: bool) -> Vec<TestDomain> {
    let mut domains = Vec::new();
    for (index, (name, at_first, at_second)) in DOMAINS.iter().enumerate() {
        for (number, op) in OPS.iter().enumerate() {
            let uuid = uuid(usize::from(!first) * 10_000 + index * 100 + number);
            let state = if first { at_first } else { at_second };
            domains.extend(state.map(|state| TestDomain::new(&format!("{}-{name}", op.name()), &uuid, state)));
        }
    }
    domains
}

/// The paths where one name is known at several URIs.
const SEVERAL: &str = "several-uris";
const OPS: [Op; 4] = [Op::Status, Op::Off, Op::Reboot, Op::On];

/// The server's state of this case's domains by UUID: first the one at the first URI, then the one
/// at the second. By name a server would report only one of the two.
fn states(stage: &Stage, watched: &mut Vec<Peer>, uuids: &[String]) -> Result<String> {
    let said = uuids.iter().map(|uuid| talk::asked(stage, 1, watched, Op::Status, uuid));
    let said: Vec<_> = said.collect::<Result<_>>()?;
    Ok(said.join(", ").replace("reply 0", "on").replace("reply 2", "off"))
}

fn case(op: Op, domain: &str) -> Case {
    let name = format!("{}-{domain}", op.name());
    let here = |first| domains(first).into_iter().filter(|domain| domain.name == name).map(|domain| domain.uuid);
    let uuids: Vec<_> = here(true).chain(here(false)).collect();
    let expected = match name.as_str() {
        "status-off-and-running" => Expected::differ(SEVERAL, "reply 2, then off, on", "reply 0, then off, on"),
        "off-off-and-running" | "off-both-running" => {
            Expected::differ(SEVERAL, "reply 0, then off, on", "reply 0, then off, off")
        }
        "on-off-and-running" => Expected::differ(SEVERAL, "reply 0, then on, on", "reply 0, then off, on"),
        _ => Expected::Same,
    };
    Case::new(name.clone(), expected, move |stage, watched| {
        let said = talk::asked(stage, 1, watched, op, &name)?;
        if op == Op::Reboot {
            // The second part of a case comes after the reply.
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(format!("{said}, then {}", states(stage, watched, &uuids)?))
    })
}

/// Lists over two URIs. If more than one has domains, fence_virtd's list repeats some, omits
/// others, and has invalid ones.
fn lists(there: Vec<TestDomain>, expected: &Expected) -> Vec<Case> {
    let mut uuids: Vec<_> = there.into_iter().map(|domain| domain.uuid).collect();
    uuids.sort_unstable();
    let said = |complete| if complete { "what there is" } else { "something else" }.to_owned();
    let expected_words = uuids.clone();
    vec![
        Case::new("a list", expected.clone(), move |stage: &Stage, watched| {
            let bytes = talk::answer(stage, 1, watched, Op::HostList, "")?;
            let list = HostList::parse(&bytes, !stage.is_stock());
            let mut listed: Vec<_> = list.into_iter().flat_map(|list| list.records).map(|record| record.uuid).collect();
            listed.sort_unstable();
            Ok(said(listed == uuids))
        }),
        Case::new("a list by the stock client", expected.clone(), move |stage: &Stage, _| {
            let text = talk::ran(stage, 1, &Client::new("list", &stage.config.key_file))?;
            let mut listed: Vec<_> = text.split_whitespace().filter(|word| word.starts_with("fe0ce000-")).collect();
            listed.sort_unstable();
            Ok(said(listed == expected_words))
        }),
    ]
}

/// Two URIs with these domains.
fn two(name: &str, first: Vec<TestDomain>, second: Vec<TestDomain>, cases: Vec<Case>) -> Scene {
    let scene = Scene::new(name, first, cases);
    let scene = scene.prepared(move |hypervisor, _| hypervisor.write("second.xml", node(&second).as_bytes()).map(drop));
    scene.configured(|config, _| config.uris.push("test:///run/lab/second.xml".to_owned()))
}

pub(crate) fn scenes() -> Vec<Scene> {
    let mut cases: Vec<_> = DOMAINS.iter().flat_map(|(name, _, _)| OPS.map(|op| case(op, name))).collect();
    let (first, second) = (domains(true), domains(false));
    let all = first.iter().chain(&second).cloned().collect();
    cases.extend(lists(all, &Expected::differ("several-uris-list", "something else", "what there is")));
    let complete = Expected::both("what there is");
    let (empty, empty_first) = (lists(first.clone(), &complete), lists(first.clone(), &complete));
    vec![
        two("two-uris", first.clone(), second, cases),
        two("two-uris-second-empty", first.clone(), Vec::new(), empty),
        two("two-uris-first-empty", Vec::new(), first, empty_first),
    ]
}
