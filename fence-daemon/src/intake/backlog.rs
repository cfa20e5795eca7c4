//! What has arrived and is not read yet: before anything is done for a request it must be known whether a newer one from the same
//! place waits behind it.
//!
//! Requests are read by one task and served by others, so the reader may be behind. Whoever wants to be sure asks it, through a
//! [`Backlog`], to take in all that is there.

use tokio::sync::{mpsc, oneshot};

/// Asks the reader of the intake to catch up.
#[derive(Clone, Debug)]
pub struct Backlog(mpsc::UnboundedSender<Question>);

/// The questions that the reader has to answer.
#[derive(Debug)]
pub struct Questions(mpsc::UnboundedReceiver<Question>);

/// Someone waits for the reader to catch up; dropping this tells him that it has.
#[derive(Debug)]
pub struct Question {
    _answer: oneshot::Sender<()>,
}

impl Backlog {
    /// The two ends. At most one question of each request that is served is open, so no bound is needed.
    #[must_use]
    pub fn new() -> (Self, Questions) {
        let (ask, questions) = mpsc::unbounded_channel();
        (Self(ask), Questions(questions))
    }

    /// Returns when all that had arrived before the call is taken in; at once if nobody reads any more.
    pub async fn read(&self) {
        let (answer, answered) = oneshot::channel();
        if self.0.send(Question { _answer: answer }).is_ok() {
            // An error is the answer: nothing is ever sent, and a reader that is gone reads nothing more.
            let _ = answered.await;
        }
    }
}

impl Questions {
    /// The next question; waits for ever where nobody is left to ask.
    pub async fn next(&mut self) -> Question {
        match self.0.recv().await {
            Some(question) => question,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_comes_from_the_reader_or_from_its_end() {
        let (backlog, mut questions) = Backlog::new();
        let asking = tokio::spawn({
            let backlog = backlog.clone();
            async move { backlog.read().await }
        });
        let question = questions.next().await;
        tokio::task::yield_now().await;
        assert!(!asking.is_finished());
        drop(question);
        asking.await.unwrap();

        let asking = tokio::spawn({
            let backlog = backlog.clone();
            async move { backlog.read().await }
        });
        tokio::task::yield_now().await;
        drop(questions);
        asking.await.unwrap();
        backlog.read().await;
    }
}
