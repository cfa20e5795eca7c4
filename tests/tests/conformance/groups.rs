//! Groups: names in another case than the domain's or the request's, and rejected duplicates of a
//! request.

use fence_common::wire::{Op, Request};
use fence_lab::lab::Guest;
use fence_lab::testdriver::{State, TestDomain, uuid};

use crate::scene::{Case, Expected, Scene};
use crate::talk::{self, SILENCE};

/// The group's and the request's spelling. The domain's own name is the first word in lower case.
const SPELLINGS: [(&str, &str); 4] = [("CVM1", "cvm1"), ("cvm2", "CVM2"), ("Cvm3", "cvm3"), ("cvm4", "cvm4")];

/// Cases that request `op` for one of the domains by name.
fn asked(op: Op, expected: Expected, spellings: &'static [(&'static str, &'static str)]) -> Vec<Case> {
    let case = |(entry, spelled): &'static (&'static str, &'static str)| {
        Case::new(format!("{} {spelled}, listed as {entry}", op.name()), expected.clone(), move |stage, watched| {
            talk::asked(stage, 1, watched, op, spelled)
        })
    };
    spellings.iter().map(case).collect()
}

/// A duplicate that asks for a callback at an address that no group permits, and then the request
/// itself.
fn denied_copy() -> Scene {
    const SEQNO: u32 = 4711;
    let expected =
        Expected::differ("denied-copies", format!("reply 3, {SILENCE}, then running"), "reply 3, reply 0, then off");
    let case = Case::new("a denied copy comes first", expected, |stage, watched| {
        let (denied, permitted) = (stage.peer(2)?, stage.peer(1)?);
        let copy = Request { seqno: SEQNO.into(), ..denied.request(Op::Off, "vm")? };
        let refused = talk::sent(&denied, copy, stage.config.auth)?;
        permitted.send(Request { seqno: SEQNO.into(), ..permitted.request(Op::Off, "vm")? })?;
        let answered = talk::perhaps(stage, &permitted)?;
        watched.extend([denied, permitted]);
        Ok(format!("{refused}, {answered}"))
    });
    let domains = vec![TestDomain::new("vm", &uuid(7100), State::Running)];
    let scene = Scene { guests: 3, ..Scene::new("denied", domains, vec![case.and_state_of("vm")]) };
    scene.configured(|config, guests| {
        let entry =
            |(guest, domain): (&Guest, &str)| format!("group {{ ip = \"{}\"; uuid = \"{domain}\"; }}\n", guest.v4);
        let text: String = guests.iter().zip(["vm", "another", "vm"]).map(entry).collect();
        config.more = format!("groups {{\n{text}}}\n");
    })
}

pub(crate) fn scenes() -> Vec<Scene> {
    let domains = (0..).zip(SPELLINGS);
    let domains = domains
        .map(|(number, (entry, _))| TestDomain::new(&entry.to_lowercase(), &uuid(7000 + number), State::Running))
        .collect();
    let (same_as_domain, other) = ([&SPELLINGS[0], &SPELLINGS[2], &SPELLINGS[3]], &SPELLINGS[1..2]);
    let mut cases = asked(Op::HostList, Expected::Same, &SPELLINGS[..1]);
    for spelling in same_as_domain {
        cases.extend(asked(Op::Status, Expected::both("reply 0"), std::slice::from_ref(spelling)));
    }
    // The group permits it, but libvirt knows no domain of exactly that name.
    cases.extend(asked(Op::Status, Expected::both("reply 2"), other));
    cases.extend(asked(Op::Off, Expected::both("reply 1"), other));
    let last = Case::new("off of what is listed in capitals", Expected::both("reply 0, then off"), |stage, watched| {
        talk::asked(stage, 1, watched, Op::Off, "cvm1")
    });
    cases.push(last.and_state_of("cvm1"));
    // One after the other: the list comes before the off.
    let scene = Scene { at_once: 1, ..Scene::new("spelling", domains, cases) };
    let spelling = scene.configured(|config, guests| {
        let mut text = String::new();
        for (index, guest) in guests.iter().enumerate() {
            let entries: String = SPELLINGS
                .iter()
                .map(|(entry, _)| if index == 0 { (*entry).to_owned() } else { entry.to_lowercase() })
                .map(|entry| format!("uuid = \"{entry}\"; "))
                .collect();
            text.push_str(&format!("group {{ ip = \"{}\"; {entries}}}\n", guest.v4));
        }
        config.more = format!("groups {{\n{text}}}\n");
    });
    vec![spelling, denied_copy()]
}
