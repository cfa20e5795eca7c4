//! The object without our loader: `bpftool` loads it, and shows its maps by name.

use std::process::Command;

use fence_common::verdict::Counters;

use fence_lab::loaded::object_path;

use crate::program::require_root;

/// Runs in a mount namespace with its own bpffs: pins and mount vanish with the shell.
const SCRIPT: &str = r#"
set -eu
mount -t bpf none /mnt
bpftool prog loadall "$1" /mnt/programs pinmaps /mnt/maps
bpftool prog show pinned /mnt/programs/fence_xdp
bpftool prog show pinned /mnt/programs/fence_tc
bpftool map show pinned /mnt/maps/fence_requests
bpftool map dump pinned /mnt/maps/fence_counters
bpftool map dump pinned /mnt/maps/fence_config
bpftool prog dump xlated pinned /mnt/programs/fence_xdp linum
bpftool prog dump xlated pinned /mnt/programs/fence_tc linum
"#;

/// The same source becomes the same object anywhere.
#[test]
fn the_object_names_no_directory_of_this_machine() {
    let path = object_path();
    let object = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let is_in = |word: &str| object.windows(word.len()).any(|part| part == word.as_bytes());
    // The remapped places are there, so the test would see others.
    assert!(is_in("./fence-ebpf/src/main.rs"), "no paths at all");
    let workspace = fence_lab::tools::workspace().to_string_lossy().into_owned();
    for place in [workspace.as_str(), "/rustlib/", "/.cargo/"] {
        assert!(!is_in(place), "{place}");
    }
}

#[test]
fn bpftool_loads_the_object_and_shows_counters_by_name() {
    require_root();
    let object = object_path();
    assert!(object.is_file(), "{} is missing. Remedy: `cargo xtask build`", object.display());
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", SCRIPT, "sh"])
        .arg(&object)
        .output()
        .expect("unshare runs. Remedy: apt-get install util-linux");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "bpftool cannot load the object (if it is missing: `apt-get install bpftool`): {stderr}"
    );
    for program in ["xdp  name fence_xdp", "sched_cls  name fence_tc"] {
        assert!(stdout.contains(program), "{stdout}");
    }
    assert!(stdout.contains("ringbuf  name fence_requests"), "{stdout}");
    // The source lines of the instructions, in the program itself and in its functions.
    for file in ["fence-ebpf/src/main.rs", "fence-common/src/compress.rs"] {
        assert!(stdout.contains(file), "no lines of {file}");
    }
    for name in Counters::NAMES.into_iter().chain(["group_v4", "min_hash", "strict_source"]) {
        assert!(stdout.contains(&format!("\"{name}\": ")), "{name} is not shown: {stdout}");
    }
}
