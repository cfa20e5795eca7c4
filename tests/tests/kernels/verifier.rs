//! The verifier's work for the kernel program, on this kernel and in each guest.

use std::path::PathBuf;

use aya::Ebpf;
use aya::programs::{Program, ProgramError, ProgramInfo};

/// The most instructions that the verifier may process. It gives up after a million. Newer
/// verifiers and compilers may need more.
pub(crate) const BUDGET: u32 = 800_000;

/// The prefix of a line about a program: name, instructions verified, bytes translated, bytes of
/// machine code.
pub(crate) const LINE: &str = "@verifier";

#[test]
fn every_program_is_far_from_the_verifiers_limit() {
    assert!(nix::unistd::geteuid().is_root(), "BPF needs root. Remedy: run it as root, as `cargo xtask test` does");
    let path = std::env::var_os("FENCE_EBPF_OBJECT").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/fence-xdp.o")),
        PathBuf::from,
    );
    let object = std::fs::read(&path);
    let object = object.unwrap_or_else(|error| panic!("{}: {error}. Remedy: `cargo xtask build`", path.display()));
    let mut ebpf = Ebpf::load(&object).expect("the object and its maps");
    let mut names: Vec<_> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    names.sort();
    assert!(!names.is_empty(), "no program in {}", path.display());
    for name in names {
        let program = ebpf.program_mut(&name).expect("it was there");
        let info = load(program).unwrap_or_else(|error| panic!("the verifier refuses {name}: {error}"));
        let verified = info.verified_instruction_count().expect("kernels tell it since 5.16");
        let sizes = (info.size_translated().unwrap_or(0), info.size_jitted());
        eprintln!("{LINE} {name} {verified} {} {}", sizes.0, sizes.1);
        assert!(verified <= BUDGET, "{name}: {verified} instructions are more than {BUDGET}");
    }
}

fn load(program: &mut Program) -> Result<ProgramInfo, ProgramError> {
    if let Program::Xdp(xdp) = program {
        xdp.load().and_then(|()| xdp.info())
    } else if let Program::SchedClassifier(classifier) = program {
        classifier.load().and_then(|()| classifier.info())
    } else {
        panic!("a program of a kind that this test does not know: {program:?}")
    }
}
