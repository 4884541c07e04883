// Segments: what a teacher with its own tokenizer judges. A token of the student is as dark as its share of its segment.

/** Of a segment, what each of the student's tokens has of its reverse KL; null where a log-prob is not finite. */
function share(segment) {
  return typeof segment?.share === "number" ? segment.share : null;
}

/** The segment of a counted token; of a token that is alone on both sides there is no more to say. */
function segmentAt(sample, index) {
  if (!sample.own) return {};
  const segment = sample.own.segments[sample.own.of[index]];
  if (!segment) return { unaligned: true, theirs: undefined };
  const alone = segment.student.length === 1 && segment.teacher.length === 1;
  return alone ? {} : { segment, theirs: undefined };
}

/** The student's tokens of a segment, under them the teacher's, and the reverse KL of the whole. */
function segmentInWords({ segment, unaligned }) {
  if (unaligned) return [["segment", "none: the tokens of both do not end alike here"]];
  if (!segment) return [];
  const parts = segment.student.length;
  return [
    ["student's tokens", tokensInWords(segment.student)],
    ["teacher's tokens", tokensInWords(segment.teacher)],
    ["reverse KL of the segment", `${typeof segment.kl === "number" ? fixed(segment.kl, 3) : segment.kl} nats${parts > 1 ? `, shared by ${parts} tokens` : ""}`],
  ];
}

function tokensInWords(tokens) {
  return tokens.map(([text, logprob]) => `${quoted(text)} ${typeof logprob === "number" ? fixed(logprob, 3) : logprob}`).join(", ");
}
