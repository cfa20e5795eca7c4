//! What goes wrong while `-c` and `keygen` work: the old file is there afterwards, and nothing
//! else.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use crate::program::{Dir, PROGRAM, Run, feed, parse, run};

const OLD: &str = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; } # mine\n\
    listeners { multicast { key_file = \"/dev/null\"; hash = \"none\"; auth = \"none\"; } }\n";
const ANSWERS: [&str; 9] = ["", "", "", "1230", "", "", "", "", "y"];

fn first(count: usize) -> String {
    ANSWERS[..count].iter().map(|answer| format!("{answer}\n")).collect()
}

fn all_answers() -> String {
    first(ANSWERS.len())
}

fn failed(run: &Run, why: &str) {
    assert_eq!(run.code, Some(1), "{}{}", run.stdout, run.stderr);
    assert!(run.stderr.contains(why), "{why}: {}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
}

#[test]
fn input_may_end_anywhere() {
    let dir = Dir::new();
    let conf = dir.write("conf", OLD);
    for count in 0..ANSWERS.len() {
        failed(&run(&["-c"], &conf, &first(count)), "the input ended before the last question: nothing was written");
        assert_eq!(dir.contents().into_iter().collect::<Vec<_>>(), [("conf".to_owned(), OLD.as_bytes().to_vec())]);
    }
    // All lines but the end of the last one are all answers.
    let done = run(&["-c"], &conf, all_answers().trim_end());
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert_eq!(parse(&std::fs::read_to_string(&conf).unwrap()).0.multicast().unwrap().port, 1230);
}

#[test]
fn standard_input_and_output_may_be_closed() {
    let dir = Dir::new();
    let conf = dir.write("conf", OLD);
    for closed in ["<&-", ">&- <&-", "<&- 2>/dev/null >&-", "</dev/null >/dev/full"] {
        let script = format!("exec \"$0\" -c -f \"$1\" {closed}");
        let run = feed(Command::new("sh").args(["-c", &script, PROGRAM]).arg(&conf), "");
        assert_eq!(run.code, Some(1), "{closed}: {}{}", run.stdout, run.stderr);
        assert!(!run.stderr.contains("panicked"), "{closed}: {}", run.stderr);
        assert_eq!(dir.contents().len(), 1, "{closed}");
    }
    assert_eq!(std::fs::read_to_string(&conf).unwrap(), OLD);
}

#[test]
fn unwritable_output_is_no_failure_without_questions() {
    let dir = Dir::new();
    let conf = dir.write("conf", OLD);
    let script = "exec \"$0\" -c --yes --port 7 -f \"$1\" >/dev/full";
    let run = feed(Command::new("sh").args(["-c", script, PROGRAM]).arg(&conf), "");
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    assert_eq!(parse(&std::fs::read_to_string(&conf).unwrap()).0.multicast().unwrap().port, 7);
}

#[test]
fn a_link_stays_one() {
    let dir = Dir::new();
    let real = dir.write("real", OLD);
    symlink("real", dir.path("conf")).unwrap();
    let done = run(&["-c"], &dir.path("conf"), &all_answers());
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    assert!(
        done.stdout.contains(&format!("is a symbolic link: {} is what will change", real.display())),
        "{}",
        done.stdout
    );
    let contents = dir.contents();
    assert_eq!(contents["conf"], b"real");
    assert_eq!(parse(&String::from_utf8(contents["real"].clone()).unwrap()).0.multicast().unwrap().port, 1230);
    assert_eq!((contents.len(), &contents["real.bak"][..]), (3, OLD.as_bytes()));

    symlink("nowhere", dir.path("dangling")).unwrap();
    failed(&run(&["-c"], &dir.path("dangling"), "y\n"), "leads nowhere");
    assert!(!dir.path("nowhere").exists());
}

#[test]
fn only_regular_files_are_replaced() {
    let dir = Dir::new();
    std::fs::create_dir(dir.path("directory")).unwrap();
    nix::unistd::mkfifo(&dir.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["directory", "fifo"] {
        failed(&run(&["-c", "--yes"], &dir.path(name), ""), "not a regular file");
    }
    failed(&run(&["-c"], &dir.path("no/such/conf"), &format!("y\n{}", all_answers())), "mkdir -p ");
    failed(&run(&["-c"], &dir.path("fifo/conf"), "y\n"), "cannot read");
}

#[test]
fn files_of_others_are_neither_used_nor_harmed() {
    let dir = Dir::new();
    let conf = dir.write("conf", OLD);
    dir.write("canary", "alive");
    for name in ["conf.tmp", "conf.new", ".conf", ".conf.tmp", "conf~", "conf.bak", ".fence-daemon-"] {
        symlink("canary", dir.path(name)).unwrap();
    }
    let before = dir.contents();
    let done = run(&["-c"], &conf, &all_answers());
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    let after = dir.contents();
    for (name, content) in &before {
        assert!(name == "conf" || after[name] == *content, "{name}");
    }
    assert_eq!((after.len(), &after["conf.bak.1"][..]), (before.len() + 1, OLD.as_bytes()));
}

#[test]
fn a_change_by_somebody_else_is_not_overwritten() {
    let dir = Dir::new();
    let conf = dir.write("conf", OLD);
    let mut child = Command::new(PROGRAM)
        .arg("-c")
        .arg("-f")
        .arg(&conf)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answers = child.stdin.take().unwrap();
    answers.write_all(first(8).as_bytes()).unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("End Configuration") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "it has ended");
    }
    dir.write("conf", "theirs");
    answers.write_all(b"y\n").unwrap();
    std::io::copy(&mut said, &mut std::io::sink()).unwrap();
    failed(&child.wait_with_output().unwrap().into(), "has changed meanwhile");
    assert_eq!(dir.contents().into_iter().collect::<Vec<_>>(), [("conf".to_owned(), b"theirs".to_vec())]);
}

/// Runs a shell script in a mount namespace of its own; `$0` is the program and `$1` the directory.
fn with_mounts(dir: &Dir, script: &str) -> Run {
    let flags = if nix::unistd::geteuid().is_root() { "-m" } else { "-Urm" };
    let mut command = Command::new("unshare");
    feed(command.args([flags, "sh", "-euc", script, PROGRAM]).arg(dir.path("")), "")
}

#[test]
fn a_full_disk_leaves_the_old_file() {
    let dir = Dir::new();
    dir.write("answers", &all_answers());
    dir.write("old", OLD);
    // One page for the directory's one file, none for a second one; `d` is a file that takes the
    // room.
    let script = "cd \"$1\"; mkdir full; mount -t tmpfs -o size=8k none full; cp old full/conf; echo x > full/d
        set +e; \"$0\" -c -f full/conf < answers; echo \"code $?\" >&2; \"$0\" keygen full/key; echo \"code $?\" >&2
        set -e; cmp old full/conf; test \"$(ls -A full)\" = \"conf\nd\"";
    let run = with_mounts(&dir, script);
    assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
    assert_eq!(run.stderr.matches("code 1").count(), 2, "{}", run.stderr);
    assert_eq!(run.stderr.matches("No space left on device").count(), 2, "{}", run.stderr);
    assert!(run.stderr.contains("make room"), "{}", run.stderr);
}

#[test]
fn a_read_only_disk_is_reported() {
    let dir = Dir::new();
    dir.write("answers", &all_answers());
    dir.write("old", OLD);
    let script = "cd \"$1\"; mkdir ro; mount -t tmpfs none ro; cp old ro/conf; mount -o remount,ro ro
        set +e; \"$0\" -c -f ro/conf < answers; echo \"code $?\" >&2; \"$0\" keygen ro/key; echo \"code $?\" >&2
        set -e; cmp old ro/conf; test \"$(ls -A ro)\" = conf";
    let run = with_mounts(&dir, script);
    assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
    assert_eq!(run.stderr.matches("code 1").count(), 2, "{}", run.stderr);
    assert_eq!(run.stderr.matches("Read-only file system").count(), 2, "{}", run.stderr);
}

#[test]
fn a_limit_of_file_sizes_leaves_the_old_file_and_no_half() {
    let dir = Dir::new();
    let conf = dir.write("conf", OLD);
    let limited = |arguments: &[&str], input: &str| {
        let mut command = Command::new("sh");
        feed(command.args(["-c", "ulimit -f 0; exec \"$0\" \"$@\"", PROGRAM]).args(arguments), input)
    };
    failed(&limited(&["-c", "-f", conf.to_str().unwrap()], &all_answers()), "File too large");
    failed(&limited(&["keygen", dir.path("key").to_str().unwrap()], ""), "File too large");
    assert_eq!(dir.contents().into_iter().collect::<Vec<_>>(), [("conf".to_owned(), OLD.as_bytes().to_vec())]);
}
