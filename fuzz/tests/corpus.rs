//! Replays the corpora with a small stack, and tries mutations for a moment. `cargo xtask fuzz`
//! does that for hours.

#[cfg(test)]
mod replayed {
    use std::path::{Path, PathBuf};

    use fence_fuzz::{TARGETS, Target};
    use proptest::prelude::*;
    use proptest::sample::Index;

    /// The stack of a target in bytes. The daemon's threads have eight times as much, since frames
    /// are large without optimisation.
    const STACK: usize = 256 << 10;

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name)
    }

    /// The inputs of a target in a fixed order, each with its file's name.
    fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
        let entries = folder(name).read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder(name).display()));
        let paths = entries.map(|entry| entry.unwrap().path());
        let mut inputs: Vec<_> = paths
            .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
            .collect();
        if name == "config" {
            inputs.extend(fence_config::cases::cases().map(|case| (case.title.to_owned(), case.bytes())));
        }
        inputs.sort();
        inputs
    }

    /// The words of `config.dict`, in libFuzzer's notation.
    fn words() -> Vec<Vec<u8>> {
        let lines = include_str!("../config.dict").lines().filter(|line| line.starts_with('"'));
        lines
            .map(|line| {
                let quoted = line.strip_prefix('"').and_then(|line| line.strip_suffix('"')).unwrap();
                let mut bytes = quoted.bytes();
                let mut word = Vec::new();
                while let Some(byte) = bytes.next() {
                    word.push(match byte {
                        b'\\' => match bytes.next().unwrap() {
                            b'x' => {
                                let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
                                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                            }
                            other => other,
                        },
                        other => other,
                    });
                }
                word
            })
            .collect()
    }

    fn with_a_small_stack(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn(test).unwrap();
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn every_input_of_the_corpora_passes() {
        for (name, target) in TARGETS {
            let inputs = corpus(name);
            assert!((10..150).contains(&inputs.len()), "{name}: {} inputs: merge them (fuzz/README.md)", inputs.len());
            for (file, bytes) in inputs {
                eprintln!("{name}/{file}");
                with_a_small_stack(move || target(&bytes));
            }
        }
    }

    #[test]
    fn a_key_in_the_dictionary_is_as_it_is_written() {
        let words = words();
        assert!(words.contains(&b"key_file".to_vec()) && words.contains(&b" = \"".to_vec()), "{words:?}");
        assert!(words.contains(&b"\xef\xbb\xbf".to_vec()) && words.contains(&b"\n".to_vec()), "{words:?}");
    }

    /// One change of an input.
    #[derive(Clone, Debug)]
    enum Mutation {
        Remove(Index, u8),
        Set(Index, u8),
        Insert(Index, Index),
        Repeat(Index, u8, u8),
        /// Continues with the end of another input.
        Splice(Index, Index, Index),
    }

    fn mutation() -> impl Strategy<Value = Mutation> {
        let at = any::<Index>;
        prop_oneof![
            (at(), any::<u8>()).prop_map(|(at, len)| Mutation::Remove(at, len % 32)),
            (at(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
            (at(), at()).prop_map(|(at, word)| Mutation::Insert(at, word)),
            (at(), any::<u8>(), 1..20_u8).prop_map(|(at, len, times)| Mutation::Repeat(at, len, times)),
            (at(), at(), at()).prop_map(|(at, other, from)| Mutation::Splice(at, other, from)),
        ]
    }

    impl Mutation {
        fn apply(&self, mut bytes: Vec<u8>, inputs: &[(String, Vec<u8>)], words: &[Vec<u8>]) -> Vec<u8> {
            let place = |at: &Index| at.index(bytes.len() + 1);
            match self {
                Self::Remove(at, len) => {
                    let at = place(at);
                    let end = bytes.len().min(at + usize::from(*len));
                    bytes.drain(at..end);
                }
                Self::Set(at, byte) => {
                    let at = place(at);
                    if let Some(place) = bytes.get_mut(at) {
                        *place = *byte;
                    }
                }
                Self::Insert(at, word) => {
                    let (at, word) = (place(at), &words[word.index(words.len())]);
                    bytes.splice(at..at, word.iter().copied());
                }
                Self::Repeat(at, len, times) => {
                    let at = place(at);
                    let end = bytes.len().min(at + usize::from(*len));
                    let part = bytes[at..end].repeat(usize::from(*times));
                    bytes.splice(at..at, part);
                }
                Self::Splice(at, other, from) => {
                    let other = &inputs[other.index(inputs.len())].1;
                    let from = from.index(other.len() + 1);
                    bytes.truncate(place(at));
                    bytes.extend_from_slice(&other[from..]);
                }
            }
            bytes
        }
    }

    fn mutated(name: &'static str, target: Target) {
        let (inputs, words) = (corpus(name), words());
        let strategy = (any::<Index>(), proptest::collection::vec(mutation(), 1..6));
        proptest!(ProptestConfig { cases: 1500, ..ProptestConfig::default() }, |((start, mutations) in strategy)| {
            let bytes = inputs[start.index(inputs.len())].1.clone();
            let bytes = mutations.iter().fold(bytes, |bytes, mutation| mutation.apply(bytes, &inputs, &words));
            target(&bytes);
        });
    }

    #[test]
    fn mutations_of_configurations_hold() {
        mutated("config", fence_fuzz::config::check);
    }

    #[test]
    fn mutations_of_requests_hold() {
        mutated("request", fence_fuzz::request::check);
    }

    #[test]
    fn mutations_of_connections_hold() {
        mutated("stream", fence_fuzz::stream::check);
    }

    #[test]
    fn mutations_of_events_hold() {
        mutated("event", fence_fuzz::event::check);
    }

    #[test]
    fn mutations_of_lines_hold() {
        mutated("line", fence_fuzz::line::check);
    }

    #[test]
    fn mutations_of_messages_between_hosts_hold() {
        mutated("hosts", fence_fuzz::hosts::check);
    }
}
