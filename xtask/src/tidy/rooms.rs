//! The rooms of fence-daemon, and the imports that each may have.
//!
//! A room is a module of `fence-daemon/src`. The table lists them from the ground up: a room
//! imports only rooms above it in the table, so cycles are impossible. Between crates Cargo
//! enforces the same. Test code may import anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// One room, and the rooms that it may import.
struct Room {
    /// Its module path below the crate, with `/`.
    name: &'static str,
    imports: &'static [&'static str],
}

/// Every room, from the ground up.
const ROOMS: &[Room] = &[
    Room { name: "clock", imports: &[] },
    Room { name: "commands", imports: &[] },
    Room { name: "fault", imports: &[] },
    Room { name: "options", imports: &[] },
    Room { name: "systemd", imports: &[] },
    Room { name: "state", imports: &[] },
    Room { name: "observe", imports: &["clock"] },
    Room { name: "history", imports: &["clock", "observe", "state"] },
    Room { name: "process", imports: &["observe", "systemd"] },
    Room { name: "intake", imports: &["clock", "observe", "state", "systemd"] },
    Room { name: "callback", imports: &["fault", "intake"] },
    Room { name: "policy", imports: &["callback"] },
    Room { name: "hypervisor/deadline", imports: &[] },
    Room { name: "hypervisor/libvirt", imports: &["clock", "hypervisor/deadline"] },
    Room { name: "hypervisor/process", imports: &["clock", "hypervisor/deadline", "state"] },
    Room { name: "hypervisor/known", imports: &["clock", "hypervisor/libvirt", "hypervisor/process", "state"] },
    Room {
        name: "hypervisor/fence",
        imports: &[
            "clock",
            "fault",
            "hypervisor/deadline",
            "hypervisor/known",
            "hypervisor/libvirt",
            "hypervisor/process",
            "state",
        ],
    },
    Room {
        name: "hypervisor",
        imports: &[
            "clock",
            "hypervisor/deadline",
            "hypervisor/fence",
            "hypervisor/known",
            "hypervisor/libvirt",
            "hypervisor/process",
            "policy",
        ],
    },
    Room { name: "hosts/transport", imports: &["clock"] },
    Room { name: "hosts/corosync", imports: &["clock", "hosts/transport"] },
    Room { name: "hosts/proof", imports: &["clock"] },
    Room { name: "hosts", imports: &["clock", "fault", "hosts/proof", "hosts/transport", "hypervisor", "policy"] },
    Room { name: "control", imports: &["clock", "hosts", "hypervisor", "intake", "observe", "state"] },
    Room { name: "metrics", imports: &["control", "state"] },
    Room {
        name: "pipeline",
        imports: &["callback", "clock", "fault", "hosts", "hypervisor", "intake", "observe", "policy", "state"],
    },
    Room {
        name: "daemon",
        imports: &[
            "clock",
            "control",
            "fault",
            "history",
            "hosts",
            "hosts/corosync",
            "hypervisor",
            "intake",
            "metrics",
            "observe",
            "pipeline",
            "process",
            "systemd",
        ],
    },
];

/// Crates that only these rooms may name.
const CRATES: &[(&str, &[&str])] = &[
    ("aya", &["intake", "daemon"]),
    ("fence_client", &[]),
    ("fence_control", &["control", "history", "metrics"]),
    ("http_body_util", &["metrics"]),
    ("hyper", &["metrics"]),
    ("hyper_util", &["metrics"]),
    ("lexopt", &["options"]),
    ("libloading", &["hosts/corosync"]),
    ("prometheus_client", &["metrics"]),
    ("sd_notify", &["systemd"]),
    ("virt", &["hypervisor/libvirt"]),
    ("virt_sys", &["hypervisor/libvirt"]),
];

/// The directory of the rooms, below the tree's root.
pub(super) const FOLDER: &str = "fence-daemon/src/";

/// The imports of the rooms, collected file by file.
#[derive(Default)]
pub(super) struct Rooms {
    arrows: BTreeMap<&'static str, BTreeSet<&'static str>>,
}

impl Rooms {
    /// Checks one file of the tree. Returns the violations of the table.
    pub(super) fn look(&mut self, file: &str, text: &str) -> Vec<(usize, String)> {
        let Some(module) = module_of(file) else { return Vec::new() };
        let Some(room) = room_of(&module) else {
            return vec![(1, "in no room: give it one in xtask/src/tidy/rooms.rs".to_owned())];
        };
        let arrows = self.arrows.entry(room.name).or_default();
        let mut broken = Vec::new();
        for (line, path) in paths(text) {
            if let Some((name, _)) = CRATES
                .iter()
                .find(|(name, rooms)| path.first().is_some_and(|first| first == name) && !rooms.contains(&room.name))
            {
                broken.push((line, format!("{} may not name the crate {name}", room.name)));
            }
            let Some(target) = absolute(&module, &path).as_deref().and_then(room_of) else { continue };
            if target.name == room.name {
                continue;
            }
            arrows.insert(target.name);
            if !room.imports.contains(&target.name) {
                broken.push((line, format!("{} may not import {}", room.name, target.name)));
            }
        }
        broken
    }

    /// The actual imports, one line for each room, from the ground up.
    pub(super) fn graph(&self) -> String {
        let mut text = String::new();
        for room in ROOMS {
            let arrows = self.arrows.get(room.name).into_iter().flatten().copied().collect::<Vec<_>>();
            let _ = writeln!(
                text,
                "{:<19} -> {}",
                room.name,
                if arrows.is_empty() { "-".to_owned() } else { arrows.join(", ") }
            );
        }
        text
    }

    /// Imports in the table that no code uses: the table shows the actual state.
    pub(super) fn unused(&self) -> Vec<String> {
        let unused = |room: &Room| {
            let there = self.arrows.get(room.name);
            let idle = room.imports.iter().filter(|name| there.is_none_or(|there| !there.contains(*name)));
            idle.map(|name| format!("{} does not import {name}: take the arrow off", room.name)).collect::<Vec<_>>()
        };
        ROOMS.iter().flat_map(unused).collect()
    }
}

/// The module path of a file; `None` for files outside the table.
fn module_of(file: &str) -> Option<Vec<String>> {
    let path = file.strip_prefix(FOLDER)?.strip_suffix(".rs")?;
    let path = path.strip_suffix("/mod").unwrap_or(path);
    let module: Vec<String> = path.split('/').map(str::to_owned).collect();
    let is_program = matches!(module.first()?.as_str(), "main" | "lib" | "bin");
    let is_test = module.iter().any(|part| part == "tests");
    (!is_program && !is_test).then_some(module)
}

/// The room of a module path: the one with the longest matching name.
fn room_of(module: &[impl AsRef<str>]) -> Option<&'static Room> {
    let is_in = |room: &&Room| {
        let mut parts = module.iter();
        room.name.split('/').all(|part| parts.next().is_some_and(|own| own.as_ref() == part))
    };
    ROOMS.iter().filter(is_in).max_by_key(|room| room.name.len())
}

/// A path in `module`'s text, from the crate's root; `None` if it leads to another crate.
fn absolute(module: &[String], path: &[String]) -> Option<Vec<String>> {
    let rest = match path.first()?.as_str() {
        "crate" => return Some(path[1..].to_vec()),
        "self" => return Some(module.iter().chain(&path[1..]).cloned().collect()),
        "super" => path.iter().take_while(|part| *part == "super").count(),
        _ => return None,
    };
    let above = module.len().checked_sub(rest)?;
    Some(module[..above].iter().chain(&path[rest..]).cloned().collect())
}

/// The paths in a file before its tests, each with its line: those that begin with `crate`, `self`
/// or `super`, and those of [`CRATES`]. A `use` with braces counts as several.
fn paths(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut code = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let is_for_tests = line.starts_with("#[cfg(test)]");
        if is_for_tests && lines.peek().is_some_and(|next| next.ends_with('{')) {
            break;
        }
        if is_for_tests {
            // On a line of its own: a module in another file, an import.
            lines.next();
            code.push('\n');
        } else if !line.trim_start().starts_with("//") {
            // Links in comments are no imports.
            code.push_str(line);
        }
        code.push('\n');
    }
    let mut found = Vec::new();
    let roots = ["crate", "self", "super"].into_iter().chain(CRATES.iter().map(|(name, _)| *name));
    for root in roots {
        for (at, _) in code.match_indices(&format!("{root}::")) {
            let is_inside = code[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':'));
            if !is_inside {
                let line = code[..at].matches('\n').count() + 1;
                found.extend(expanded(&code[at..]).into_iter().map(|path| (line, path)));
            }
        }
    }
    found.sort();
    found
}

/// The paths at the beginning of `code`.
fn expanded(code: &str) -> Vec<Vec<String>> {
    let mut path = Vec::new();
    let mut rest = code;
    loop {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if end == 0 {
            break;
        }
        path.push(rest[..end].to_owned());
        let Some(after) = rest[end..].strip_prefix("::") else { return vec![path] };
        rest = after;
    }
    let Some(group) = rest.strip_prefix('{') else { return vec![path] };
    let mut all = Vec::new();
    let mut depth = 1_usize;
    let mut begins = true;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => begins = true,
            _ if begins && (c.is_alphanumeric() || c == '_') => {
                begins = false;
                for tail in expanded(&group[at..]) {
                    all.push(path.iter().cloned().chain(tail).collect());
                }
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(file: &str, text: &str) -> Vec<String> {
        Rooms::default().look(file, text).into_iter().map(|(line, what)| format!("{line}: {what}")).collect()
    }

    #[test]
    fn every_arrow_of_the_table_leads_down() {
        for (index, room) in ROOMS.iter().enumerate() {
            for import in room.imports {
                let below = ROOMS[..index].iter().any(|below| below.name == *import);
                assert!(below, "{} imports {import}, which is not below it", room.name);
            }
        }
    }

    #[test]
    fn an_arrow_up_is_found_however_it_is_written() {
        for text in [
            "use crate::pipeline::Pipeline;\n",
            "use crate::{clock, pipeline::Pipeline};\n",
            "use crate::{\n    clock::{self, Moment},\n    pipeline,\n};\n",
            "fn x() -> crate::pipeline::Pipeline {}\n",
            "use super::pipeline;\n",
        ] {
            let up: Vec<_> = broken("fence-daemon/src/callback.rs", text);
            assert_eq!(up.iter().filter(|what| what.ends_with("pipeline")).count(), 1, "{text}");
        }
        let behind =
            "#[cfg(test)]\nmod tests;\n\nuse crate::pipeline::X;\n#[cfg(test)]\nmod more {\nuse crate::daemon::X;\n";
        assert_eq!(broken("fence-daemon/src/callback.rs", behind), ["4: callback may not import pipeline"]);
        let nested = "\nuse super::super::pipeline::X;\n";
        assert_eq!(broken("fence-daemon/src/observe/journal.rs", nested), ["2: observe may not import pipeline"]);
        assert_eq!(broken("fence-daemon/src/observe/mod.rs", "use super::pipeline::X;\n").len(), 1);
    }

    #[test]
    fn allowed_imports_are_no_finding() {
        let text = "use super::limit::X;\nuse crate::clock::Moment;\n/// See [`crate::pipeline`].\n#[cfg(test)]\nuse crate::daemon;\n";
        let mut rooms = Rooms::default();
        assert_eq!(rooms.look("fence-daemon/src/observe/requests.rs", text), []);
        assert!(rooms.graph().contains("observe             -> clock\n"), "{}", rooms.graph());
        assert!(!rooms.unused().iter().any(|arrow| arrow.starts_with("observe")));
        assert!(rooms.unused().iter().any(|arrow| arrow.starts_with("callback does not import fault")));
        for file in ["fence-daemon/src/main.rs", "fence-daemon/src/pipeline/tests/denied.rs", "fence-common/src/key.rs"]
        {
            assert_eq!(broken(file, "use crate::daemon::X;\nuse fence_client::top;\n"), Vec::<String>::new());
        }
    }

    #[test]
    fn some_crates_are_for_some_rooms() {
        assert_eq!(
            broken("fence-daemon/src/policy.rs", "use virt::connect::Connect;\n"),
            ["1: policy may not name the crate virt"]
        );
        let virt = |file: &str| broken(&format!("fence-daemon/src/hypervisor/{file}"), "use virt::connect::Connect;\n");
        assert_eq!((virt("libvirt/x.rs").len(), virt("known/x.rs").len(), virt("x.rs").len()), (0, 1, 1));
        assert_eq!(broken("fence-daemon/src/daemon/x.rs", "fence_client::top::run();\n").len(), 1);
        assert_eq!(broken("fence-daemon/src/attic.rs", "").len(), 1);
    }

    #[test]
    fn the_longest_name_is_the_room() {
        assert_eq!(room_of(&["hypervisor", "known", "table"]).map(|room| room.name), Some("hypervisor/known"));
        assert_eq!(room_of(&["hypervisor", "probe"]).map(|room| room.name), Some("hypervisor"));
        assert!(room_of(&["attic"]).is_none());
    }
}
