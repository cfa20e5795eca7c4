//! Lets a task wait until every datagram that has arrived is read.
//!
//! The pipeline needs this before it acts: a newer request from the same endpoint may be unread.
//! One task reads requests and others serve them, so the reader may lag. A [`Backlog`] asks the
//! reader to catch up.

use tokio::sync::{mpsc, oneshot};

/// Asks the reader of the intake to catch up.
#[derive(Clone, Debug)]
pub struct Backlog(mpsc::UnboundedSender<Question>);

/// The questions that the reader has to answer.
#[derive(Debug)]
pub struct Questions(mpsc::UnboundedReceiver<Question>);

/// A task waits for the reader to catch up. Dropping this value tells that task that it has.
#[derive(Debug)]
pub struct Question {
    _answer: oneshot::Sender<()>,
}

impl Backlog {
    /// The two ends. Each request has at most one open question here, so the queue needs no bound.
    #[must_use]
    pub fn new() -> (Self, Questions) {
        let (ask, questions) = mpsc::unbounded_channel();
        (Self(ask), Questions(questions))
    }

    /// Waits until the reader has taken in all that arrived before this call. Returns at once if
    /// there is no reader any more.
    pub async fn read(&self) {
        let (answer, answered) = oneshot::channel();
        if self.0.send(Question { _answer: answer }).is_ok() {
            // The error is the answer: nothing is ever sent, and a reader that is gone reads
            // nothing more.
            let _ = answered.await;
        }
    }
}

impl Questions {
    /// The next question. Waits for ever once no [`Backlog`] is left.
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
