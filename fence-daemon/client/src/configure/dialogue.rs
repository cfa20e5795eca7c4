//! Questions and answers, line by line: with a person at a terminal, or a script that pipes its
//! answers in.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The longest answer, in bytes.
const LONGEST: usize = 64 << 10;
/// How often a question is repeated: a script with unusable answers must not loop forever.
const PATIENCE: usize = 10;

/// Why the questions end early.
#[derive(Debug, thiserror::Error)]
pub enum Interruption {
    /// Ctrl-D, or fewer lines than questions.
    #[error("the input ended before the last question")]
    EndOfInput,
    /// Ctrl-C or another signal.
    #[error("interrupted ({0})")]
    Signal(Signal),
    /// Too many unusable answers.
    #[error("no usable answer in {PATIENCE} attempts")]
    Nonsense,
    /// A system call failed.
    #[error("cannot ask questions: {0}")]
    Io(#[from] io::Error),
}

/// A source of answers.
pub trait Answers {
    /// The next line without its end.
    ///
    /// # Errors
    /// There is none.
    fn next(&mut self) -> Result<Vec<u8>, Interruption>;

    /// Whether the answers are visible beside the questions, as on a terminal.
    fn are_seen(&self) -> bool;
}

/// Standard input, and the signals that end the questions. They no longer end the process by
/// themselves, even after this value is dropped, so that no file is left half done.
#[derive(Debug)]
pub struct StandardInput {
    signals: SignalFd,
    /// Bytes beyond the last line.
    ahead: Vec<u8>,
    ended: bool,
}

impl StandardInput {
    /// Prepares for questions.
    ///
    /// # Errors
    /// A system call failed.
    pub fn new() -> io::Result<Self> {
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
        signals.thread_block()?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { signals, ahead: Vec::new(), ended: false })
    }

    /// Waits for input or a signal, whichever comes first.
    fn wait(&self) -> Result<(), Interruption> {
        let stdin = io::stdin();
        let ready = PollFlags::POLLIN;
        let mut fds = [PollFd::new(self.signals.as_fd(), ready), PollFd::new(stdin.as_fd(), ready)];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
                Ok(_) => break,
            }
        }
        match self.signals.read_signal().map_err(io::Error::from)? {
            None => Ok(()),
            Some(signal) => {
                // The terminal discards its output a moment after it has sent the signal.
                std::thread::sleep(Duration::from_millis(50));
                let number = i32::try_from(signal.ssi_signo).unwrap_or_default();
                Err(Interruption::Signal(Signal::try_from(number).unwrap_or(Signal::SIGTERM)))
            }
        }
    }
}

impl Answers for StandardInput {
    fn next(&mut self) -> Result<Vec<u8>, Interruption> {
        loop {
            if let Some(end) = self.ahead.iter().position(|byte| *byte == b'\n') {
                let rest = self.ahead.split_off(end.saturating_add(1));
                let mut line = std::mem::replace(&mut self.ahead, rest);
                line.pop();
                return Ok(line);
            }
            if self.ended || self.ahead.len() > LONGEST {
                // A last line without its end counts too.
                let line = std::mem::take(&mut self.ahead);
                return if line.is_empty() { Err(Interruption::EndOfInput) } else { Ok(line) };
            }
            self.wait()?;
            let mut some = [0; 4096];
            match nix::unistd::read(io::stdin(), &mut some) {
                Ok(0) => self.ended = true,
                Ok(count) => self.ahead.extend_from_slice(some.get(..count).unwrap_or_default()),
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {}
                // The terminal has gone, or there was no input.
                Err(nix::errno::Errno::EIO | nix::errno::Errno::EBADF) => self.ended = true,
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }

    fn are_seen(&self) -> bool {
        io::stdin().is_terminal()
    }
}

/// Asks questions.
pub struct Dialogue<'d> {
    answers: &'d mut dyn Answers,
    out: &'d mut dyn Write,
    /// Whether a failed output ends the dialogue.
    must_be_heard: bool,
}

impl<'d> Dialogue<'d> {
    /// A dialogue with this input and output.
    pub fn new(answers: &'d mut dyn Answers, out: &'d mut dyn Write) -> Self {
        Self { answers, out, must_be_heard: true }
    }

    /// From now on output is optional: its failure no longer ends the dialogue.
    pub fn need_not_be_heard(&mut self) {
        self.must_be_heard = false;
    }

    /// Prints a line.
    ///
    /// # Errors
    /// The output failed, and it is not optional.
    pub fn say(&mut self, text: &str) -> Result<(), Interruption> {
        match writeln!(self.out, "{text}") {
            Err(error) if self.must_be_heard => Err(error.into()),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Asks for a value until `accept` takes the answer. An empty answer means `default`.
    ///
    /// # Errors
    /// There are no usable answers any more.
    pub fn ask<T>(
        &mut self,
        label: &str,
        default: &str,
        accept: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, Interruption> {
        for _ in 0..PATIENCE {
            let answer = self.line(&format!("{label} [{default}]: "))?;
            let answer = if answer.is_empty() { default } else { &answer };
            match accept(answer) {
                Ok(value) => return Ok(value),
                Err(why) => self.say(&format!("Not taken: {why}"))?,
            }
        }
        Err(Interruption::Nonsense)
    }

    /// Asks for consent: only `y` or `yes` gives it.
    ///
    /// # Errors
    /// There are no answers any more.
    pub fn consent(&mut self, question: &str) -> Result<bool, Interruption> {
        let answer = self.line(&format!("{question} [y/N]? "))?;
        Ok(answer.eq_ignore_ascii_case("y") || answer.eq_ignore_ascii_case("yes"))
    }

    fn line(&mut self, prompt: &str) -> Result<String, Interruption> {
        write!(self.out, "{prompt}")?;
        self.out.flush()?;
        let answer = self.answers.next();
        if !self.answers.are_seen() || answer.is_err() {
            // A terminal shows the answer itself. Without one, at least the line must end.
            let seen = answer.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
            writeln!(self.out, "{}", seen.trim().replace(char::is_control, "?"))?;
        }
        // Invalid bytes become a character that no value accepts.
        Ok(String::from_utf8_lossy(&answer?).trim().to_owned())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Lines as a script has them.
    pub(in super::super) struct Script(Vec<Vec<u8>>);

    impl Script {
        pub(in super::super) fn new(text: &str) -> Self {
            Self(text.lines().rev().map(|line| line.as_bytes().to_vec()).collect())
        }
    }

    impl Answers for Script {
        fn next(&mut self) -> Result<Vec<u8>, Interruption> {
            self.0.pop().ok_or(Interruption::EndOfInput)
        }

        fn are_seen(&self) -> bool {
            false
        }
    }

    fn ask(answers: &str) -> (Result<u8, Interruption>, String) {
        let (mut script, mut out) = (Script::new(answers), Vec::new());
        let answer = Dialogue::new(&mut script, &mut out)
            .ask("Number", "7", |text| text.parse::<u8>().map_err(|error| format!("{error}.")));
        (answer, String::from_utf8(out).unwrap())
    }

    #[test]
    fn an_empty_answer_is_the_default_and_nonsense_is_asked_again() {
        assert_eq!(ask("\n").0.unwrap(), 7);
        assert_eq!(ask("  9 \r\n").0.unwrap(), 9);
        let (answer, said) = ask("x\n\n");
        assert_eq!(answer.unwrap(), 7);
        assert_eq!(said, "Number [7]: x\nNot taken: invalid digit found in string.\nNumber [7]: \n");
    }

    #[test]
    fn the_questions_end_when_the_answers_do_or_never_make_sense() {
        assert!(matches!(ask("x\n").0, Err(Interruption::EndOfInput)));
        let (answer, said) = ask(&"x\n".repeat(1000));
        assert!(matches!(answer, Err(Interruption::Nonsense)));
        assert_eq!(said.matches("Number").count(), PATIENCE);
    }

    #[test]
    fn only_yes_is_consent() {
        for (answer, expected) in [("y", true), ("YES", true), ("", false), ("n", false), ("ye", false), ("yy", false)]
        {
            let (mut script, mut out) = (Script::new(&format!("{answer}\n")), Vec::new());
            assert_eq!(Dialogue::new(&mut script, &mut out).consent("Sure").unwrap(), expected, "{answer}");
        }
    }

    #[test]
    fn an_answer_does_nothing_to_the_terminal() {
        let (mut script, mut out) = (Script::new("\x1b[31m"), Vec::new());
        let _ = Dialogue::new(&mut script, &mut out).consent("Sure");
        assert!(!out.contains(&0x1b));
    }
}
